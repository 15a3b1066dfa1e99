"use strict";
(() => {
  const data = JSON.parse(document.getElementById("images").textContent);
  const element = (id) => document.getElementById(id);
  const canvas = element("canvas");
  const readout = element("readout");
  const AXES = { axial: 2, coronal: 1, sagittal: 0 }; // of voxels in the order right, anterior, superior
  const MODES = { crosshair: 8, window: 9, pan: 3 };
  const REGIONS = [[230, 159, 0], [86, 180, 233], [0, 158, 115], [204, 121, 167], [240, 228, 66], [213, 94, 0]];
  const BRAIN = [[120, 220, 140]];
  const FOR_LABEL = { R: [0, 140, 255, 255], G: [0, 0, 110, 225], B: [0, 20, 50, 150], A: [0, 150, 220, 255], I: [0, 1, 128, 255] };
  const AGAINST_LABEL = { R: [0, 0, 60, 190], G: [0, 40, 150, 230], B: [0, 140, 255, 255], A: [0, 150, 220, 255], I: [0, 1, 128, 255] };
  const WIDE = [[0, [0, 0, 0.62, 1]], [1, [0.62, 0, 0.38, 0.5]], [2, [0.62, 0.5, 0.38, 0.5]]]; // plane; left, top, width, height
  const NARROW = [[0, [0, 0, 1, 0.62]], [1, [0, 0.62, 0.5, 0.38]], [2, [0.5, 0.62, 0.5, 0.38]]];
  const ALL_PLANES = 3;
  const LOOKS = {
    scan: { colormap: "gray", cal_min: 0, cal_max: 80 },
    brain: { cal_min: 0, cal_max: 1 },
    haemorrhage: { cal_min: 0, cal_max: REGIONS.length },
    map: { colormap: "for", colormapNegative: "against", cal_min: 0.2, cal_max: 1 },
  };

  const labelTable = (colours) => {
    const all = [[0, 0, 0], ...colours];
    return {
      R: all.map((each) => each[0]), G: all.map((each) => each[1]), B: all.map((each) => each[2]),
      A: all.map((_, value) => (value ? 255 : 0)), I: all.map((_, value) => value),
    };
  };

  async function load(image, index, opacity) {
    const volume = await niivue.NVImage.loadFromBase64({
      base64: image.data, name: `${index}.nii.gz`, opacity, colorbarVisible: false, ...LOOKS[image.kind],
    });
    if (image.kind === "brain") volume.setColormapLabel(labelTable(BRAIN));
    if (image.kind === "haemorrhage") volume.setColormapLabel(labelTable(REGIONS));
    return volume;
  }

  async function start() {
    const context = document.createElement("canvas").getContext("webgl2");
    if (!context) return;
    context.getExtension("WEBGL_lose_context")?.loseContext();
    element("viewer").hidden = false;
    const nv = new niivue.Niivue({
      isRadiologicalConvention: true, dragAndDropEnabled: false, logLevel: "error", loadingText: "",
      backColor: [0, 0, 0, 1], crosshairColor: [1, 0.85, 0.2, 0.7], fontColor: [1, 1, 1, 1], multiplanarShowRender: 0,
      showAllOrientationMarkers: true, viewModeHotKey: "", clipPlaneHotKey: "",
      cycleClipPlaneHotKey: "",
    });
    await nv.attachToCanvas(canvas, false);
    nv.addColormap("for", FOR_LABEL);
    nv.addColormap("against", AGAINST_LABEL);
    const scan = await load(data.images[0], 0, 1);
    nv.addVolume(scan);
    const size = scan.dimsRAS.slice(1, 4);
    const voxel = () => nv.frac2vox(nv.scene.crosshairPos);

    // Layers: only those that are shown are in the viewer.
    const layers = data.images.map((image, index) => ({
      image, volume: null, checkbox: element(`layer-${index}`), opacity: element(`opacity-${index}`),
      threshold: element(`threshold-${index}`),
    }));
    async function show(index) {
      const layer = layers[index];
      layer.volume ??= await load(layer.image, index, Number(layer.opacity.value));
      const isThere = nv.volumes.includes(layer.volume);
      if (layer.checkbox.checked && !isThere) nv.addVolume(layer.volume);
      if (!layer.checkbox.checked && isThere) nv.removeVolume(layer.volume);
      nv.createOnLocationChange();
    }
    const refresh = (layer) => { if (nv.volumes.includes(layer.volume)) nv.updateGLVolume(); };
    layers.forEach((layer, index) => {
      if (!index) return;
      layer.checkbox.addEventListener("change", () => show(index));
      layer.opacity.addEventListener("input", () => {
        if (layer.volume) layer.volume.opacity = Number(layer.opacity.value);
        refresh(layer);
      });
      layer.threshold?.addEventListener("input", async () => {
        const value = Number(layer.threshold.value);
        element(`threshold-${index}-value`).textContent = value.toFixed(2);
        layer.volume ??= await load(layer.image, index, Number(layer.opacity.value));
        layer.volume.cal_min = value;
        refresh(layer);
      });
    });

    // Position
    const side = (value, positive, negative) => `${value >= 0 ? positive : negative} ${Math.abs(value).toFixed(1)}`;
    nv.onLocationChange = (location) => {
      const [x, y, z] = location.mm;
      const parts = [`${side(x, "R", "L")}, ${side(y, "A", "P")}, ${side(z, "S", "I")} mm`];
      for (const each of location.values) {
        const { kind, name, regions } = data.images[parseInt(each.name, 10)];
        if (kind === "scan") parts.push(`${Math.round(each.value)} HU`);
        else if (kind === "map") parts.push(`${name}: ${each.value.toFixed(2)}`);
        else if (kind === "haemorrhage" && each.value > 0.5) {
          parts.push((regions[Math.round(each.value) - 1] ?? "haemorrhage").replace(/_/g, " "));
        }
      }
      readout.textContent = parts.join("  ·  ");
      const position = voxel();
      for (const [plane, axis] of Object.entries(AXES)) {
        const slider = element(`slice-${plane}`);
        slider.value = Math.round(position[axis]) + 1;
        element(`slice-${plane}-value`).textContent = `${slider.value} of ${size[axis]}`;
      }
    };
    for (const [plane, axis] of Object.entries(AXES)) {
      const slider = element(`slice-${plane}`);
      slider.max = size[axis];
      slider.addEventListener("input", () => {
        const step = [0, 0, 0];
        step[axis] = Number(slider.value) - 1 - Math.round(voxel()[axis]);
        nv.moveCrosshairInVox(...step);
      });
    }
    canvas.addEventListener("keydown", (event) => {
      const { key, shiftKey } = event;
      const step = {
        ArrowUp: shiftKey ? [0, 1, 0] : [0, 0, 1], ArrowDown: shiftKey ? [0, -1, 0] : [0, 0, -1],
        ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], PageUp: [0, 0, 5], PageDown: [0, 0, -5],
        Home: [0, 0, -size[2]], End: [0, 0, size[2]],
      }[key];
      event.stopImmediatePropagation(); // NiiVue has keys of its own, which change other things
      if (!step) return;
      event.preventDefault();
      nv.moveCrosshairInVox(...step);
    }, { capture: true });
    canvas.addEventListener("keyup", (event) => event.stopImmediatePropagation(), { capture: true });

    // Window
    const showWindow = () => {
      element("centre").value = Math.round((scan.cal_min + scan.cal_max) / 2);
      element("width").value = Math.round(scan.cal_max - scan.cal_min);
      const known = `${element("centre").value},${element("width").value}`;
      const preset = element("preset");
      preset.value = [...preset.options].some((option) => option.value === known) ? known : "";
    };
    const setWindow = (centre, width) => {
      if (Number.isFinite(centre) && width > 0) {
        scan.cal_min = centre - width / 2;
        scan.cal_max = centre + width / 2;
        nv.updateGLVolume();
      }
      showWindow();
    };
    [scan.robust_min, scan.robust_max] = [0, 80]; // to which a double click resets the window
    nv.onIntensityChange = showWindow;
    canvas.addEventListener("mousemove", (event) => { if (event.buttons) showWindow(); });
    element("preset").addEventListener("change", ({ target }) => {
      if (target.value) setWindow(...target.value.split(",").map(Number));
    });
    for (const id of ["centre", "width"]) {
      element(id).addEventListener("change", () => setWindow(Number(element("centre").value), Number(element("width").value)));
    }
    const setDrag = (mode) => nv.setMouseEventConfig({
      leftButton: { primary: MODES[mode], withShift: MODES.window }, rightButton: MODES.window, centerButton: MODES.pan,
    });
    setDrag("crosshair");
    nv.setTouchEventConfig({ singleTouch: MODES.crosshair, doubleTouch: MODES.window });
    element("drag").addEventListener("change", ({ target }) => setDrag(target.value));
    const setPlane = () => {
      const plane = Number(element("plane").value);
      if (plane === ALL_PLANES) {
        const layout = canvas.clientWidth < 480 ? NARROW : WIDE;
        nv.setCustomLayout(layout.map(([sliceType, position]) => ({ sliceType, position })));
      } else {
        nv.clearCustomLayout();
      }
      nv.setSliceType(plane);
    };
    element("plane").addEventListener("change", setPlane);
    setPlane();

    nv.scene.crosshairPos = nv.mm2frac(data.start);
    const blood = layers.findIndex(({ image }) => image.kind === "haemorrhage" && !image.empty);
    const first = blood > 0 ? blood : layers.findIndex(({ image }) => image.kind === "map" && !image.empty);
    if (first > 0) {
      layers[first].checkbox.checked = true;
      await show(first);
    }
    nv.createOnLocationChange();
    nv.drawScene();
    document.body.classList.add("has-viewer");
  }

  start().catch((error) => {
    element("viewer").hidden = true;
    element("viewer-message").textContent = `The viewer could not start: ${error.message}. The picture shows a few slices.`;
  });
})();
