"""Report package: HTML pages about one run, or comparing several, from the files that runs write."""
