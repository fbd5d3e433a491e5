"""The live page: what it shows (`live_view`), how it is served (`routes`), and the page itself (`page/`)."""
