"""Does interaction-aware allocation pay? One record per game played, and the tables and plots made from them."""
