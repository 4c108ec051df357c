// Markdown as elements. What a model writes is never taken for HTML: tags are shown as text, and what the libraries
// make passes a sanitizer that knows a few harmless elements and attributes alone.

/* global marked, DOMPurify, hljs */

const ALLOWED = {
  ALLOWED_TAGS: ["a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol",
    "p", "pre", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"],
  ALLOWED_ATTR: ["align", "class", "data-language", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "start"],  // the others are compared with that expression
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };

const parser = new marked.Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html({ text }) { return escaped(text); },
    image({ href, text }) { return `<a href="${escaped(href)}">${escaped(text || href)}</a>`; },  // nothing is loaded
    checkbox({ checked }) { return checked ? "☑ " : "☐ "; },
    code({ text, lang }) {
      const name = (lang || "").trim().split(/\s/)[0], language = hljs.getLanguage(name) ? name : "plaintext";
      const colored = hljs.highlight(text, { language, ignoreIllegals: true }).value;
      return `<pre><code data-language="${escaped(name)}">${colored}</code></pre>`;
    },
  },
});

/** The elements of a Markdown text; `codeBar` makes what stands above a block of code, of its language and text. */
export function markdown(text, codeBar) {
  const fragment = DOMPurify.sanitize(parser.parse(text), ALLOWED);
  for (const link of fragment.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const table of fragment.querySelectorAll("table")) wrap(table, "scroller");
  for (const pre of fragment.querySelectorAll("pre")) {
    pre.tabIndex = 0;  // so that it scrolls by keys
    wrap(pre, "code").prepend(codeBar(pre.firstChild.dataset.language || "text", pre.textContent));
  }
  return fragment;
}

function escaped(text) { return text.replace(/[&<>"']/g, (character) => ESCAPES[character]); }

function wrap(node, className) {
  const box = document.createElement("div");
  box.className = className;
  node.replaceWith(box);
  box.append(node);
  return box;
}
