// Promlint checks metrics as `promtool check metrics` does, with the same library, and without the
// rest of promtool, which takes many minutes to build.
//
//	promlint text           reads version 0.0.4 of the text format, and reports bad names
//	promlint openmetrics    reads OpenMetrics, and reports bad syntax
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/textparse"
)

func main() {
	check := map[string]func(io.Reader) error{"text": text, "openmetrics": openmetrics}
	if len(os.Args) != 2 || check[os.Args[1]] == nil {
		fail(errors.New("name a format: text or openmetrics"))
	}
	if err := check[os.Args[1]](os.Stdin); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func text(input io.Reader) error {
	problems, err := promlint.New(input).Lint()
	if err != nil {
		return err
	}
	all := []error{}
	for _, problem := range problems {
		all = append(all, fmt.Errorf("%s: %s", problem.Metric, problem.Text))
	}
	return errors.Join(all...)
}

func openmetrics(input io.Reader) error {
	metrics, err := io.ReadAll(input)
	if err != nil {
		return err
	}
	parser := textparse.NewOpenMetricsParser(metrics, labels.NewSymbolTable())
	for {
		entry, err := parser.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if entry == textparse.EntrySeries {
			var series labels.Labels
			parser.Labels(&series)
		}
	}
}
