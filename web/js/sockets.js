// Gives conditions a colour of their own on sockets and wires; a type that the editor doesn't know
// has none in Nodes 2.0, where its sockets can't be seen.
import { app } from "../../../scripts/app.js";

const TYPE = "OMINI2_CONDITION";
const COLOUR = "#38d6c0";

app.registerExtension({
  name: "Omini2.Sockets",
  setup() {
    app.canvas.default_connection_color_byType[TYPE] = COLOUR;
    LGraphCanvas.link_type_colors[TYPE] = COLOUR;
    // The editor sets those of its own types on the body, and would take ours away there.
    document.documentElement.style.setProperty(`--color-datatype-${TYPE}`, COLOUR);
  },
});
