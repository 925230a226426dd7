"""Images, latents and caches. Importing the package costs no torch; its modules do."""
