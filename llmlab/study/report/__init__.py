"""What a study has to say, for people: a page, Markdown, a LaTeX table and figures, all from its results.json."""
