// Shows on our nodes what the last run did.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { addPanel, drawPanel } from "./panel.js";
import { followQueue, graphIsLoaded, graphIsLoading, showInRun } from "./runs.js";

const NODES = [
  "Omini2ApplyLoRA",
  "Omini2CompactTokens",
  "Omini2ConditionCache",
  "Omini2LoadCache",
  "Omini2SpotEdit",
  "Omini2TrainLoRA",
];

app.registerExtension({
  name: "Omini2.Figures",
  beforeConfigureGraph: graphIsLoading,
  afterConfigureGraph: graphIsLoaded,
  setup() {
    followQueue();
    api.addEventListener("omini2.run", ({ detail }) => {
      for (const [id, figures] of Object.entries(detail?.nodes ?? {})) {
        showInRun(detail.prompt_id, id, { figures });
      }
    });
    api.addEventListener("omini2.training", ({ detail }) => {
      if (detail?.figures) showInRun(detail.prompt_id, detail.node, { figures: detail.figures });
    });
    api.addEventListener("executed", ({ detail }) => {
      const figures = detail?.output?.omini2?.[0];
      if (figures) showInRun(detail.prompt_id, detail.display_node ?? detail.node, { figures });
    });
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;
    const { onNodeCreated, onConfigure } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function () {
      const result = onNodeCreated?.apply(this, arguments);
      addPanel(this);
      return result;
    };
    nodeType.prototype.onConfigure = function () {
      const result = onConfigure?.apply(this, arguments);
      drawPanel(this);
      return result;
    };
  },
});
