//! The Helm chart and the Kustomize tree are one truth, and the chart's documents agree with it.

mod chart;
mod environment;
mod monitoring;
mod names;
mod rendered;
mod values;
