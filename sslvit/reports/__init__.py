"""Tables, figures and HTML pages: bench, demo, show and sweep."""
