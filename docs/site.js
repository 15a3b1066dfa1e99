// The theme gives its search dialog no name. Wide blocks of code can be scrolled by keyboard only if they can have the
// focus, which the theme removes where no mouse is found.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
const makeFocusable = () =>
  document
    .querySelectorAll(".md-typeset pre > code:not([tabindex]), .md-typeset__scrollwrap:not([tabindex])")
    .forEach((each) => { each.tabIndex = 0; });
makeFocusable();
new MutationObserver(makeFocusable).observe(document.body, { attributeFilter: ["tabindex"], subtree: true });
