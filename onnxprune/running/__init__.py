"""The round loop: what a run is asked, tries, decides, keeps and reports."""
