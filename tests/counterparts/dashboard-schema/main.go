// Dashboard-schema checks that a dashboard on standard input fits Grafana's schema, with Grafana's
// own library: no unknown field, and no value of another type.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

func main() {
	if err := check(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func check(input io.Reader) error {
	plugins.RegisterDefaultPlugins()
	raw, err := io.ReadAll(input)
	if err != nil {
		return err
	}
	var board dashboard.Dashboard
	err = board.UnmarshalJSONStrict(raw)
	// Without problems it returns an empty list of them.
	var problems cog.BuildErrors
	if err != nil && !(errors.As(err, &problems) && len(problems) == 0) {
		return err
	}
	return board.Validate()
}
