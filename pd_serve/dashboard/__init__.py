"""The live page: its data (`live_view`, `recent`), its routes (`routes`) and its files (`page/`)."""
