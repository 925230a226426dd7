"""Images, latents and caches. Importing the room costs no torch; its modules do."""
