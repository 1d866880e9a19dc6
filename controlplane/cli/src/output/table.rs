//! Text in columns.

use super::printable;

/// Rows below a heading, each column as wide as its widest cell.
pub(crate) fn columns(heading: &[&str], rows: &[Vec<String>]) -> String {
    let heading: Vec<String> = heading.iter().map(|cell| (*cell).to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(&heading)
        .chain(rows)
        .map(|row| row.iter().map(|cell| one_line(cell)).collect())
        .collect();
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count)
        .map(|column| {
            rows.iter().filter_map(|row| row.get(column)).map(|cell| width(cell)).max().unwrap_or(0)
        })
        .collect();
    rows.iter().map(|row| line(row, &widths)).collect()
}

/// Names and values, one a line, the values in one column; an empty value is left out.
pub(crate) fn pairs(pairs: &[(&str, String)]) -> String {
    let widest = pairs.iter().map(|(name, _)| width(name)).max().unwrap_or(0);
    pairs
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| line(&[(*name).to_owned(), one_line(value)], &[widest, 0]))
        .collect()
}

fn line(cells: &[String], widths: &[usize]) -> String {
    let mut text = String::new();
    for (cell, column) in cells.iter().zip(widths) {
        text.push_str(cell);
        text.extend(std::iter::repeat_n(' ', column.saturating_sub(width(cell)) + 2));
    }
    format!("{}\n", text.trim_end())
}

fn one_line(text: &str) -> String {
    printable(&text.replace('\n', " "))
}

fn width(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_end_without_spaces() {
        let rows =
            vec![vec!["m-1".to_owned(), "PRECOPY".to_owned()], vec!["long-name".to_owned(), String::new()]];
        assert_eq!(columns(&["ID", "STATE"], &rows), "ID         STATE\nm-1        PRECOPY\nlong-name\n");
    }

    #[test]
    fn empty_values_are_left_out() {
        assert_eq!(pairs(&[("state", "FAILED".into()), ("error", String::new())]), "state  FAILED\n");
    }
}
