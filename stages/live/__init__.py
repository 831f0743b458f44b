"""What an open training stage shows while it runs: curves, strips of images, alarms and cost, in the store."""
