package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"sallyport/internal/conform"
	"sallyport/internal/daemon"
)

// conform is "sallyport conform".
func (c *cli) conform() *cobra.Command {
	cmd := &cobra.Command{
		Use: "conform", Short: "Check an implementation against the SPIFFE specifications", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var socket string
	var only bool
	api := &cobra.Command{
		Use:   "workload-api",
		Short: "Check a Workload API, as the workload that this runs as",
		Long: "Check a Workload API: what each numbered demand of the specifications says,\n" +
			"as far as a workload can see it. Run it as a process that has an identity,\n" +
			"such as: sidecar run --config FILE -- sallyport conform workload-api",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if socket == "" {
				return usage(errors.New("no socket is given, and SPIFFE_ENDPOINT_SOCKET is not set: use --socket"))
			}
			got, err := conform.WorkloadAPI(cmd.Context(), socket)
			if err != nil {
				return daemon.Hint(&daemon.ExitError{Code: daemon.Unreachable, Err: err}, "run it as a workload that has an identity there")
			}
			return c.printVerdicts("conform workload-api", got, only)
		},
	}
	api.Flags().StringVar(&socket, "socket", os.Getenv("SPIFFE_ENDPOINT_SOCKET"), "the Workload API's socket")
	api.Flags().BoolVar(&only, "json", false, "print the last line alone")
	cmd.AddCommand(api)
	return cmd
}

// A conformVerdict is one demand in the last line.
type conformVerdict struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

// printVerdicts prints a table and, as the last line, the result as JSON.
func (c *cli) printVerdicts(name string, got []conform.Verdict, only bool) error {
	var cases struct {
		Tried   int `json:"tried"`
		Passed  int `json:"passed"`
		Failed  int `json:"failed"`
		Skipped int `json:"skipped"`
	}
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	verdicts := []conformVerdict{}
	for _, v := range got {
		word, detail := "pass", ""
		cases.Tried++
		switch {
		case v.Skipped != "":
			word, detail = "not applicable", v.Skipped
			cases.Tried--
			cases.Skipped++
		case v.Err != nil:
			word, detail = "FAIL", strings.ReplaceAll(v.Err.Error(), "\n", "; ")
			cases.Failed++
		default:
			cases.Passed++
		}
		verdicts = append(verdicts, conformVerdict{fmt.Sprintf("%d %s", v.Must, v.Name), v.Err == nil, detail})
		if !only {
			fmt.Fprintf(w, "%d\t%s\t%s\t%s\n", v.Must, word, v.Name, detail)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	ok := cases.Failed == 0 && cases.Passed > 0
	line, err := json.Marshal(map[string]any{"name": name, "ok": ok, "cases": cases, "verdicts": verdicts})
	if err != nil {
		return err
	}
	fmt.Fprintf(c.stdout, "%s\n", line)
	if !ok {
		return &daemon.ExitError{Code: daemon.Failed, Err: fmt.Errorf("%d of %d demands are not met", cases.Failed, cases.Tried)}
	}
	return nil
}
