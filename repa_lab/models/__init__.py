"""Model families: what each says of itself (`facts`, no torch), how it is built (`family`), where it is tapped (`tap`)."""
