"""What several weightings share: problems in the Gramian, and how they are solved."""
