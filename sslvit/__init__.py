"""sslvit."""
