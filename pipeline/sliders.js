const sliders = [...document.querySelectorAll(".turn input")];
const show = (slider) => {
  const card = slider.closest(".turn");
  card.style.setProperty("--at", slider.value);
  card.querySelector("output").textContent = slider.dataset.texts.split("|")[slider.value];
};
sliders.forEach((slider) => {
  slider.addEventListener("input", () => show(slider));
  show(slider);
});
document.querySelectorAll(".play button").forEach((button) => {
  const own = [...button.parentElement.nextElementSibling.querySelectorAll("input")];
  let timer = 0, step = 0;
  button.addEventListener("click", () => {
    button.textContent = timer ? "Move all" : "Stop";
    if (timer) {
      timer = clearInterval(timer) || 0;
      return;
    }
    timer = setInterval(() => {
      step += 1;
      own.forEach((slider) => {
        const last = Number(slider.max);
        const at = (step + Math.floor(last / 2)) % (2 * last);
        slider.value = at > last ? 2 * last - at : at;
        show(slider);
      });
    }, 180);
  });
});
