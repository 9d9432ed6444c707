//! One figure of `docs/performance.md`: its line for people, its JSON for programs.

use std::{fs, path::PathBuf};

use serde_json::{Value, json};

use crate::{gauge::quantile, service::beside};

/// Median, least and most of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let [median, min, max] = [0.5, 0.0, 1.0].map(|q| quantile(&values, q));
        Self { median, min, max }
    }

    pub fn json(self) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }
}

/// Prints the line of a ratio and writes it, with what it was made of, to `target/bench/NAME.json`.
///
/// # Errors
/// Where the file can't be written.
pub fn publish(name: &str, ratios: &[f64], least: f64, details: Value) -> Result<(), String> {
    publish_asked(name, ratios, ("least", least), details)
}

/// The same of a ratio that is to be small.
///
/// # Errors
/// Where the file can't be written.
pub fn publish_at_most(
    name: &str,
    ratios: &[f64],
    most: f64,
    details: Value,
) -> Result<(), String> {
    publish_asked(name, ratios, ("most", most), details)
}

fn publish_asked(
    name: &str,
    ratios: &[f64],
    (bound, asked): (&str, f64),
    details: Value,
) -> Result<(), String> {
    let ratio = Spread::of(ratios.iter().copied());
    let Spread { median, min, max } = ratio;
    println!("RATIO {name} = {median:.3} ({min:.3} … {max:.3}) of {} pairs", ratios.len());
    let figure = json!({ "name": name, "ratio": ratio.json(), bound: asked, "details": details });
    save(&format!("{name}.json"), &format!("{figure:#}\n"))?;
    Ok(())
}

/// Writes a file into `target/bench`: beside the folder that this program was built into.
///
/// # Errors
/// Where it can't be written.
pub fn save(name: &str, text: &str) -> Result<PathBuf, String> {
    let built_into = beside("")?;
    let target = built_into.parent().ok_or("this program is in no folder")?;
    let folder = target.join("bench");
    let path = folder.join(name);
    let written = fs::create_dir_all(&folder).and_then(|()| fs::write(&path, text));
    written.map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_five_pairs_is_the_third() {
        let spread = Spread::of([0.5, 0.9, 0.1, 0.7, 0.6]);
        assert_eq!(spread, Spread { median: 0.6, min: 0.1, max: 0.9 });
    }

    #[test]
    fn one_pair_has_no_spread() {
        assert_eq!(Spread::of([0.5]), Spread { median: 0.5, min: 0.5, max: 0.5 });
    }
}
