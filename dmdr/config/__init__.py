"""What a run is: its sections, how a config file is read, which settings name a result. No torch."""
