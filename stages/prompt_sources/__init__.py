"""Where prompts come from: files in many formats, and public sets by name."""
