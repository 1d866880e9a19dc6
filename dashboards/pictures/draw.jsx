// One dashboard, drawn with Grafana's own panels from what Prometheus answered. `window.SHEET` is the dashboard with the
// series of each query, `window.RANGE` the time shown.

import { FieldType, ThemeContext, createTheme, dateTime, getDisplayProcessor, toDataFrame } from '@grafana/data';
import { BigValue, BigValueColorMode, BigValueGraphMode, GlobalStyles, PanelChrome, TimeSeries } from '@grafana/ui';
import { createRoot } from 'react-dom/client';
import 'uplot/dist/uPlot.min.css';

const COLUMN_PX = 60;
const ROW_PX = 30;
const GAP_PX = 8;
const theme = createTheme({ colors: { mode: 'dark' } });
const timeZone = 'utc';

function legendOf(target, labels) {
  if (target.legendFormat === '__auto') {
    const named = Object.entries(labels).filter(([name]) => name !== '__name__');
    return named.map(([name, value]) => `${name}=${value}`).join(', ') || 'value';
  }
  return target.legendFormat.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? '').trim();
}

function seriesOf(panel) {
  return panel.targets.flatMap((target) =>
    target.series.map((one) => ({
      name: legendOf(target, one.metric),
      labels: one.metric,
      points: one.values ?? [one.value],
    }))
  );
}

function withDisplay(field) {
  field.display = getDisplayProcessor({ field, theme, timeZone });
  return field;
}

function colorOf(name, overrides) {
  const own = overrides.find(({ matcher }) => matcher.id === 'byName' && matcher.options === name);
  return own?.properties.find(({ id }) => id === 'color')?.value ?? { mode: 'palette-classic' };
}

// A point where Prometheus gave none is a gap, as in Grafana.
function frameOf(series, { defaults, overrides }, index, step) {
  const at = new Map(series.points.map(([seconds, value]) => [Math.round(seconds * 1000), Number(value)]));
  const times = [];
  for (let time = window.RANGE.start; time <= window.RANGE.end; time += step) {
    times.push(Math.round(time));
  }
  const near = (time) => at.get(time) ?? at.get(time - 1) ?? at.get(time + 1);
  const frame = toDataFrame({
    fields: [
      { name: 'Time', type: FieldType.time, values: times, config: {} },
      {
        name: series.name,
        type: FieldType.number,
        values: times.map((time) => (Number.isFinite(near(time)) ? near(time) : null)),
        config: {
          unit: defaults.unit === 'none' ? 'short' : defaults.unit,
          min: defaults.min,
          max: defaults.max,
          displayName: series.name,
          color: colorOf(series.name, overrides),
          custom: { pointSize: 4, lineInterpolation: 'linear', axisPlacement: 'auto', ...defaults.custom },
        },
      },
    ],
  });
  frame.fields[1].state = { seriesIndex: index, displayName: series.name };
  frame.fields.forEach(withDisplay);
  return frame;
}

// What is counted over a time has one point in that time.
function stepOf(series) {
  const gaps = series.flatMap(({ points }) => points.slice(1).map(([seconds], index) => (seconds - points[index][0]) * 1000));
  return gaps.length > 0 ? Math.max(window.RANGE.step, Math.round(Math.min(...gaps))) : window.RANGE.step;
}

function Lines({ panel, width, height }) {
  const series = seriesOf(panel).filter((one) => one.points.some(([, value]) => Number.isFinite(Number(value))));
  if (series.length === 0) {
    return <Nothing />;
  }
  const range = { from: dateTime(window.RANGE.start), to: dateTime(window.RANGE.end) };
  const timeRange = { ...range, raw: range };
  const legend = { showLegend: true, displayMode: 'list', placement: 'bottom', calcs: [] };
  const frames = series.map((one, index) => frameOf(one, panel.fieldConfig, index, stepOf(series)));
  return (
    <TimeSeries frames={frames} width={width} height={height} timeRange={timeRange} timeZone={timeZone} legend={legend} />
  );
}

function Numbers({ panel, width, height }) {
  const series = seriesOf(panel);
  if (series.length === 0) {
    return <Nothing text={panel.fieldConfig.defaults.noValue} />;
  }
  const { unit, thresholds } = panel.fieldConfig.defaults;
  const steps = thresholds.steps.map((step) => ({ ...step, value: step.value ?? -Infinity }));
  const config = { unit, thresholds: { ...thresholds, steps }, color: { mode: 'thresholds' } };
  const field = withDisplay({ name: 'value', type: FieldType.number, values: [], config });
  return (
    <div style={{ display: 'flex', flexDirection: 'column' }}>
      {series.map((one) => {
        const value = { ...field.display(Number(one.points.at(-1)[1])), title: one.name };
        return (
          <BigValue
            key={one.name}
            value={value}
            width={width}
            height={height / series.length}
            theme={theme}
            colorMode={BigValueColorMode.Value}
            graphMode={BigValueGraphMode.None}
          />
        );
      })}
    </div>
  );
}

function Rows({ panel }) {
  const series = seriesOf(panel);
  if (series.length === 0) {
    return <Nothing />;
  }
  const hidden = new Set(['__name__', 'job']);
  const names = [...new Set(series.flatMap((one) => Object.keys(one.labels)))].filter((name) => !hidden.has(name));
  const cell = { padding: '4px 12px', textAlign: 'left', borderBottom: `1px solid ${theme.colors.border.weak}` };
  return (
    <table style={{ width: '100%', color: theme.colors.text.primary, fontSize: 13 }}>
      <thead>
        <tr>
          {[...names, 'Value'].map((name) => (
            <th key={name} style={{ ...cell, color: theme.colors.text.link }}>
              {name}
            </th>
          ))}
        </tr>
      </thead>
      <tbody>
        {series.map((one, index) => (
          <tr key={index}>
            {names.map((name) => (
              <td key={name} style={cell}>
                {one.labels[name]}
              </td>
            ))}
            <td style={cell}>{Number(Number(one.points.at(-1)[1]).toFixed(1)).toLocaleString('en')}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

// Grafana's heatmap is not among its components: cells by `le`, from cumulative buckets.
function Heat({ panel, width, height }) {
  const bound = (one) => (one.labels.le === '+Inf' ? Infinity : Number(one.labels.le));
  const buckets = seriesOf(panel).sort((a, b) => bound(a) - bound(b));
  const cells = buckets.map((bucket, index) => {
    const below = new Map(index > 0 ? buckets[index - 1].points : []);
    return bucket.points.map(([time, value]) => ({ time, count: Math.max(0, value - (below.get(time) ?? 0)) }));
  });
  const used = cells.map((row) => row.some((cell) => cell.count > 1e-9));
  const [first, last] = [used.indexOf(true), used.lastIndexOf(true)];
  if (first < 0) {
    return <Nothing />;
  }
  const most = Math.max(...cells.flat().map((cell) => cell.count));
  const display = withDisplay({
    name: 'le',
    type: FieldType.number,
    values: [],
    config: { unit: panel.options.yAxis.unit },
  }).display;
  const label = (value) => (value === Infinity ? '+Inf' : `${display(value).text}${display(value).suffix ?? ''}`);
  const left = 70;
  const bottom = 24;
  const rows = last - first + 1;
  const rowHeight = (height - bottom) / rows;
  const { start, end, step } = window.RANGE;
  const across = (seconds) => left + ((seconds * 1000 - start) / (end - start)) * (width - left);
  const cellWidth = Math.max(2, (step / (end - start)) * (width - left) - 1);
  const ticks = [0, 0.25, 0.5, 0.75].map((share) => start + share * (end - start));
  return (
    <svg width={width} height={height} fontSize="12" fill={theme.colors.text.secondary}>
      {cells.slice(first, last + 1).flatMap((row, index) =>
        row
          .filter((cell) => cell.count > 1e-9)
          .map((cell) => (
            <rect
              key={`${index} ${cell.time}`}
              x={across(cell.time)}
              y={(rows - 1 - index) * rowHeight}
              width={cellWidth}
              height={rowHeight - 1}
              fill={`rgba(255, 152, 48, ${0.15 + 0.85 * Math.sqrt(cell.count / most)})`}
            />
          ))
      )}
      {buckets.slice(first, last + 1).map((bucket, index) => (
        <text key={bucket.labels.le} x={left - 8} y={(rows - index - 0.5) * rowHeight + 4} textAnchor="end">
          {index % Math.ceil(14 / rowHeight) === 0 ? label(bound(bucket)) : ''}
        </text>
      ))}
      {ticks.map((time) => (
        <text key={time} x={across(time / 1000)} y={height - 6}>
          {new Date(time).toISOString().slice(11, 19)}
        </text>
      ))}
    </svg>
  );
}

function Nothing({ text = 'No data' }) {
  return (
    <div style={{ display: 'grid', placeItems: 'center', height: '100%', color: theme.colors.text.secondary }}>{text}</div>
  );
}

const KINDS = { timeseries: Lines, stat: Numbers, table: Rows, heatmap: Heat };

function Panel({ panel }) {
  const { x, y, w, h } = panel.gridPos;
  const place = { position: 'absolute', left: x * COLUMN_PX, top: y * ROW_PX };
  if (panel.type === 'row') {
    return <h4 style={{ ...place, margin: 0, color: theme.colors.text.primary }}>{panel.title}</h4>;
  }
  const Kind = KINDS[panel.type];
  return (
    <div style={place}>
      <PanelChrome title={panel.title} description={panel.description} width={w * COLUMN_PX - GAP_PX} height={h * ROW_PX - GAP_PX}>
        {(width, height) => <Kind panel={panel} width={width} height={height} />}
      </PanelChrome>
    </div>
  );
}

const font = { fontFamily: 'Inter, "DejaVu Sans", sans-serif' };
createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <div style={{ position: 'relative', color: theme.colors.text.primary, ...font }}>
      {window.SHEET.panels.map((panel) => (
        <Panel key={panel.id} panel={panel} />
      ))}
    </div>
  </ThemeContext.Provider>
);
