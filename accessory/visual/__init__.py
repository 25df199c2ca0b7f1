"""From pictures to what a decoder sees of them: images -> views -> encoders -> features."""
