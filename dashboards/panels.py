"""What the three dashboards are built from: panels, variables, annotations and links of one kind."""

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

DATA_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
# Every query is held to what the variables at the top of a dashboard choose.
CHOSEN = 'job=~"$job",instance=~"$instance"'
# The grid of Grafana has 24 columns.
COLUMNS = 24
HEIGHT = 8
TAG = "ramferry"
RESULTS = {"succeeded": "green", "failed": "red", "cancelled": "yellow"}


class Sheet:
    """A dashboard under construction. Panels flow from left to right, in rows of equal height."""

    def __init__(self, uid: str, title: str, description: str, *, of_one_migration: bool = False) -> None:
        self.next_id, self.x, self.y = 1, 0, 0
        self.builder = (
            dashboard.Dashboard(title)
            .uid(uid)
            .description(description)
            .tags([TAG])
            .timezone("browser")
            .time("now-1h", "now")
            .refresh("10s")
            .readonly()
            .tooltip(models.DashboardCursorSync.CROSSHAIR)
            .variables(variables(of_one_migration))
            .annotations(annotations())
            .link(link_to_others())
        )

    def row(self, title: str) -> None:
        if self.x > 0:
            self.x, self.y = 0, self.y + HEIGHT
        row = dashboard.Row(title).id(self.next_id)
        row.grid_pos(models.GridPos(h=1, w=COLUMNS, x=0, y=self.y))
        self.builder.with_row(row)
        self.next_id, self.y = self.next_id + 1, self.y + 1

    def add(self, panel, title: str, description: str, runbook: str, *, width: int = 12) -> None:
        if self.x + width > COLUMNS:
            self.x, self.y = 0, self.y + HEIGHT
        position = models.GridPos(h=HEIGHT, w=width, x=self.x, y=self.y)
        panel.id(self.next_id).title(title).description(description)
        panel.datasource(DATA_SOURCE).grid_pos(position).links([runbook_link(runbook)])
        self.builder.with_panel(panel)
        self.next_id, self.x = self.next_id + 1, self.x + width


def query(expr: str, legend: str = "__auto") -> prometheus.Dataquery:
    return prometheus.Dataquery().datasource(DATA_SOURCE).expr(expr).range().legend_format(legend)


def at_once(expr: str, legend: str = "__auto") -> prometheus.Dataquery:
    return prometheus.Dataquery().datasource(DATA_SOURCE).expr(expr).instant().legend_format(legend)


def lines(unit: str, *queries: prometheus.Dataquery, stacked: bool = False, least=0, most=None) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .unit(unit)
        .min(least)
        .line_width(2)
        .fill_opacity(30 if stacked else 8)
        .show_points(common_models.VisibilityMode.AUTO)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.TABLE)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
        .targets(lettered(queries))
    )
    if most is not None:
        panel.max(most)
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    return panel


def bars(unit: str, *queries: prometheus.Dataquery) -> timeseries.Panel:
    """Counts in spans of time. Spans of a minute at least, or what happened once would stand in several bars."""
    panel = lines(unit, *queries, stacked=True).interval("1m")
    for result, color in RESULTS.items():
        panel.override_by_name(result, [models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})])
    return panel.draw_style(common_models.GraphDrawStyle.BARS).fill_opacity(80).line_width(1)


def steps_of(panel: timeseries.Panel) -> timeseries.Panel:
    """Of values that hold until they change."""
    return panel.line_interpolation(common_models.LineInterpolation.STEP_AFTER)


def number(unit: str, *queries: prometheus.Dataquery, steps: list[tuple[float | None, str]]) -> stat.Panel:
    """One figure a series, coloured from the step that it has reached."""
    return (
        stat.Panel()
        .unit(unit)
        .no_value("none")
        .color_mode(common_models.BigValueColorMode.VALUE)
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(
            dashboard.ThresholdsConfig()
            .mode(models.ThresholdsMode.ABSOLUTE)
            .steps([models.Threshold(value=value, color=color) for value, color in steps])
        )
        .targets(lettered(queries))
    )


def rows(*queries: prometheus.Dataquery) -> table.Panel:
    targets = lettered(queries)
    for target in targets:
        target.format(prometheus_models.PromQueryFormat.TABLE)
    return table.Panel().show_header(True).filterable(True).targets(targets)


def buckets(unit: str, expr: str) -> heatmap.Panel:
    """A heatmap of the rate of a histogram's buckets, summed by `le`."""
    target = query(expr, "{{le}}").format(prometheus_models.PromQueryFormat.HEATMAP)
    return (
        heatmap.Panel()
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .cell_gap(1)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heatmap_models.HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .fill("dark-orange")
            .scale(heatmap_models.HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
        )
        .show_legend()
        .targets(lettered([target]))
    )


def quantile(share: float, histogram: str, by: str, chosen: str = CHOSEN) -> str:
    labels = ", ".join(filter(None, ["le", by]))
    return f"histogram_quantile({share}, sum by ({labels}) (rate({histogram}_bucket{{{chosen}}}[$__rate_interval])))"


def where_any(counts: str, by: str, label: str) -> str:
    """What was counted by its labels; `none` where nothing was."""
    some = f"sum by ({by}) ({counts}) > 0"
    return f'({some}) or on () label_replace(sum({counts}), "{label}", "none", "", "")'


def lettered(queries) -> list[prometheus.Dataquery]:
    return [one.ref_id(chr(ord("A") + index)) for index, one in enumerate(queries)]


def runbook_link(runbook: str) -> dashboard.DashboardLink:
    return (
        dashboard.DashboardLink("Runbook")
        .type(models.DashboardLinkType.LINK)
        .url("${runbooks}/" + runbook + ".md")
        .target_blank(True)
    )


def link_to_others() -> dashboard.DashboardLink:
    return (
        dashboard.DashboardLink("ramferry")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(True)
        .keep_time(True)
    )


def variables(of_one_migration: bool) -> list:
    chosen = [
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        listed("job", "Job", "label_values(ramferry_build_info, job)"),
        listed("instance", "Agent", 'label_values(ramferry_build_info{job=~"$job"}, instance)'),
    ]
    if of_one_migration:
        values = "label_values(ramferry_migration_memory_bytes{" + CHOSEN + "}, migration)"
        chosen.append(listed("migration", "Migration", values))
    # A path of the repository, until it says where the runbooks are served.
    runbooks = dashboard.TextBoxVariable("runbooks").label("Runbooks at").default_value("docs/runbooks")
    return [*chosen, runbooks]


def listed(name: str, label: str, values: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATA_SOURCE)
        .query(values)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


# Where a state begins: the count of migrations in it grows.
BEGINS = "sum by (state, role) (ramferry_migrations_active{" + CHOSEN + ',role="source"}) > sum by (state, role) '
BEGINS += "(ramferry_migrations_active{" + CHOSEN + ',role="source"} offset 15s)'
FIRING = 'ALERTS{alertname=~"Ramferry.+",alertstate="firing",' + CHOSEN + "}"


def annotations() -> list[dashboard.AnnotationQuery]:
    return [
        annotation("Phases", BEGINS, "blue"),
        annotation("Alerts", FIRING, "red"),
    ]


def annotation(name: str, expr: str, color: str) -> dashboard.AnnotationQuery:
    return dashboard.AnnotationQuery().name(name).datasource(DATA_SOURCE).enable(True).icon_color(color).expr(expr)
