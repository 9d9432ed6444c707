//! Latency by percentile, as a page that needs nothing else.

use std::fmt::Write;

use super::Report;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 420.0;
/// Room for the labels, left of the plot and below it.
const LEFT: f64 = 60.0;
const BELOW: f64 = 30.0;
/// The axis of percentiles: each nine takes the same room.
const NINES: f64 = 5.0;
/// The axis of latencies, in ms: each decade takes the same room.
const LEAST_MS: f64 = 0.1;
const DECADES: f64 = 5.0;
const COLOURS: [&str; 4] = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd"];

/// A page with one curve for each named report, and their tables.
pub fn page(title: &str, reports: &[(String, &Report)]) -> String {
    let (mut curves, mut tables) = (String::new(), String::new());
    for ((name, report), colour) in reports.iter().zip(COLOURS.iter().cycle()) {
        let points: Vec<String> = report
            .curve()
            .into_iter()
            .map(|(share, ms)| format!("{:.1},{:.1}", x(share), y(ms)))
            .collect();
        let points = points.join(" ");
        // Writing to a string cannot fail.
        let _ = writeln!(curves, "<polyline points=\"{points}\" stroke=\"{colour}\"/>");
        let table = escaped(&report.table());
        let name = escaped(name);
        let _ = writeln!(tables, "<h2 style=\"color:{colour}\">{name}</h2>\n<pre>{table}</pre>");
    }
    let (title, axes) = (escaped(title), axes());
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{title}</title>\n\
         <style>body {{ font-family: sans-serif }} text {{ font-size: 12px }} \
         polyline {{ fill: none; stroke-width: 1.5 }} line {{ stroke: #ddd }}</style>\n\
         <h1>{title}</h1>\n<p>Latency in ms by percentile, from each call's intended start.</p>\n\
         <svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\">\n\
         {axes}{curves}</svg>\n{tables}</html>\n"
    )
}

fn axes() -> String {
    let mut axes = String::new();
    let (right, bottom) = (WIDTH - LEFT, HEIGHT - BELOW);
    for (share, label) in [
        (0.0, "0"),
        (0.5, "50"),
        (0.9, "90"),
        (0.99, "99"),
        (0.999, "99.9"),
        (0.9999, "99.99"),
        (1.0, "100 %"),
    ] {
        let (x, below) = (x(share), bottom + 18.0);
        let _ = write!(axes, "<line x1=\"{x:.1}\" y1=\"0\" x2=\"{x:.1}\" y2=\"{bottom}\"/>");
        let _ = writeln!(
            axes,
            "<text x=\"{x:.1}\" y=\"{below}\" text-anchor=\"middle\">{label}</text>"
        );
    }
    for ms in [0.1, 1.0, 10.0, 100.0, 1_000.0] {
        let (y, left) = (y(ms), LEFT - 6.0);
        let _ = write!(axes, "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>");
        let _ = writeln!(axes, "<text x=\"{left}\" y=\"{y:.1}\" text-anchor=\"end\">{ms}</text>");
    }
    axes
}

fn x(share: f64) -> f64 {
    let nines = -(1.0 - share).max(1e-9).log10();
    LEFT + (WIDTH - 2.0 * LEFT) * (nines / NINES).clamp(0.0, 1.0)
}

fn y(ms: f64) -> f64 {
    let decades = (ms.max(LEAST_MS) / LEAST_MS).log10();
    (HEIGHT - BELOW) * (1.0 - (decades / DECADES).clamp(0.0, 1.0))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::report::tests::report;

    #[test]
    fn each_nine_and_each_decade_takes_the_same_room() {
        assert!((x(0.99) - x(0.9) - (x(0.999) - x(0.99))).abs() < 1e-6);
        assert!((y(1.0) - y(10.0) - (y(10.0) - y(100.0))).abs() < 1e-6);
        assert!(x(1.0) <= WIDTH && y(1e9) >= 0.0);
    }

    #[test]
    fn a_page_has_a_curve_for_each_run_and_loads_nothing() {
        let report = report();
        let page = page("a < b", &[("one".to_owned(), &report), ("two".to_owned(), &report)]);
        assert_eq!(page.matches("<polyline").count(), 2);
        assert!(page.contains("a &lt; b") && !page.contains("http"));
    }
}
