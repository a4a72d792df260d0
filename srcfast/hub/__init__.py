"""The Hugging Face Hub: names of repositories, downloads at a commit, and uploads."""
