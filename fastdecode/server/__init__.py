"""OpenAI's API over the engine: HTTP in `app`, the engine's thread in `service`, what both count in `metrics`."""
