document.querySelectorAll("table.sortable").forEach(function (table) {
  var body = table.tBodies[0];
  var original = Array.prototype.slice.call(body.rows);
  table.querySelectorAll("th[scope=col]").forEach(function (head, index) {
    var button = document.createElement("button");
    while (head.firstChild) button.appendChild(head.firstChild);
    head.appendChild(button);
    button.addEventListener("click", function () {
      var numeric = head.classList.contains("number");
      var order = head.getAttribute("aria-sort");
      var first = numeric ? "descending" : "ascending";
      var second = numeric ? "ascending" : "descending";
      var next = order === first ? second : order === second ? null : first;
      table.querySelectorAll("th[aria-sort]").forEach(function (other) { other.removeAttribute("aria-sort"); });
      var rows = original.slice();
      if (next) {
        head.setAttribute("aria-sort", next);
        var sign = next === "ascending" ? 1 : -1;
        rows.sort(function (a, b) {
          var x = a.cells[index].dataset.value, y = b.cells[index].dataset.value;
          if (x === "" || y === "") return (x === "") - (y === "");
          return sign * (numeric ? x - y : x.localeCompare(y, undefined, { numeric: true }));
        });
      }
      rows.forEach(function (row) { body.appendChild(row); });
    });
  });
});
