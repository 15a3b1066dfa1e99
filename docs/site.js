// The theme gives its search dialog no name, and wide blocks of code cannot be scrolled by keyboard.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
document.querySelectorAll(".md-typeset pre > code, .md-typeset__scrollwrap").forEach((each) => { each.tabIndex = 0; });
