// Lets the search for nodes find ours by the words that people type. Newer editors search a node's own
// aliases; older ones only its names, and of those the first 30 letters. They offer extensions no
// other way in, so there our nodes are added to what their own search finds.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const SHORTEST = 3; // letters that a word is searched by
const BEFORE = 3; // of the editor's own finds, which are better matches

let knowsAliases = false;

app.registerExtension({
  name: "Omini2.Search",
  beforeRegisterVueAppNodeDefs(defs) {
    knowsAliases = defs.some((def) => def.search_aliases?.length);
  },
  async setup() {
    const stores = document.getElementById("vue-app")?.__vue_app__?.config.globalProperties.$pinia;
    const service = stores?._s?.get("nodeDef")?.nodeSearchService;
    const search = service && Object.getPrototypeOf(service);
    if (knowsAliases || typeof search?.searchNode !== "function") return;
    const answer = await api.fetchApi("/omini2/words").catch(() => null); // the server may be away
    if (answer?.ok) extend(search, await answer.json());
  },
});

/**
 * @param {any} search what all of the editor's searches are made from
 * @param {Record<string, string[]>} words by the node that they are for
 */
function extend(search, words) {
  const { searchNode } = search;
  search.searchNode = function (query, filters = [], options = {}, ...rest) {
    const found = searchNode.call(this, query, filters, options, ...rest);
    const word = query.trim().toLowerCase();
    if (word.length < SHORTEST || filters.length) return found;
    const ours = (this.nodeFuseSearch?.data ?? []).filter(
      (def) => !found.includes(def) && words[def.name]?.some((alias) => begins(alias, word)),
    );
    const all = [...found.slice(0, BEFORE), ...ours, ...found.slice(BEFORE)];
    return options.limit ? all.slice(0, options.limit) : all;
  };
}

/**
 * Whether an alias, or a word of it, begins so.
 * @param {string} alias
 * @param {string} word
 */
function begins(alias, word) {
  return ` ${alias.toLowerCase()}`.includes(` ${word}`);
}
