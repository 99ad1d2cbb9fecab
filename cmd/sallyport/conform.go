package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/conform"
	"sallyport/internal/daemon"
)

// conform is "sallyport conform".
func (c *cli) conform() *cobra.Command {
	cmd := &cobra.Command{
		Use: "conform", Short: "Check an implementation against the SPIFFE specifications", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.conformWorkload(), c.conformDomain())
	return cmd
}

// conformWorkload is "sallyport conform workload-api".
func (c *cli) conformWorkload() *cobra.Command {
	var w conform.Workload
	var domain string
	var only bool
	cmd := &cobra.Command{
		Use:   "workload-api",
		Short: "Check a Workload API, as the workload that this runs as",
		Long: "Check a Workload API against the 134 demands of the SPIFFE specifications,\n" +
			"as far as a workload can see them. Run it as a process that has an identity,\n" +
			"such as: sidecar run --config FILE -- sallyport conform workload-api\n\n" +
			"With --domain it also lies to the validator, in the name of a throw-away\n" +
			"trust domain that sallyport conform domain made and that the workload's\n" +
			"entry federates with.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if w.Address == "" {
				return usage(errors.New("no socket is given, and SPIFFE_ENDPOINT_SOCKET is not set: use --socket"))
			}
			if _, err := conform.Target(w.Address); err != nil {
				return usage(err)
			}
			var err error
			if w.Domain, err = loadDomain(domain); err != nil {
				return err
			}
			got, err := conform.RunWorkload(cmd.Context(), w)
			if err != nil {
				return daemon.Hint(&daemon.ExitError{Code: daemon.Unreachable, Err: err}, "run it as a workload that has an identity there")
			}
			return c.printVerdicts("conform workload-api", got, only)
		},
	}
	f := cmd.Flags()
	f.StringVar(&w.Address, "socket", os.Getenv("SPIFFE_ENDPOINT_SOCKET"), "the Workload API's address, such as unix:///run/agent.sock")
	f.StringVar(&domain, "domain", "", "the folder of a throw-away trust domain that the workload federates with")
	f.DurationVar(&w.Wait, "wait", 0, "how long to wait for a second message of a stream")
	f.BoolVar(&only, "json", false, "print the last line alone")
	return cmd
}

// conformDomain is "sallyport conform domain".
func (c *cli) conformDomain() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "domain FOLDER",
		Short: "Make a throw-away trust domain for the other checks",
		Long: "Make a throw-away trust domain: its keys, and bundle.json, with which the\n" +
			"implementation under test is to federate. What its keys sign is accepted by\n" +
			"whoever federates with it: end the federation after the check.",
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			td, err := spiffeid.TrustDomainFromString(name)
			if err != nil {
				return usage(fmt.Errorf("--trust-domain: %w", err))
			}
			d, err := conform.NewDomain(td)
			if err != nil {
				return err
			}
			if err := d.Save(args[0]); err != nil {
				return daemon.Hint(fmt.Errorf("keep the trust domain: %w", err), "name a folder that has no trust domain yet")
			}
			fmt.Fprintf(c.stdout, "%s is made, valid for 30 days; federate with %s\n", td.Name(), filepath.Join(args[0], conform.BundleFile))
			return nil
		},
	}
	cmd.Flags().StringVar(&name, "trust-domain", "conform.example", "its name")
	return cmd
}

// loadDomain reads a throw-away trust domain, if one is named.
func loadDomain(dir string) (*conform.Domain, error) {
	if dir == "" {
		return nil, nil
	}
	d, err := conform.LoadDomain(dir)
	if err != nil {
		return nil, daemon.Hint(&daemon.ExitError{Code: daemon.Usage, Err: fmt.Errorf("--domain: %w", err)}, "make one with: sallyport conform domain FOLDER")
	}
	return d, nil
}

// A conformVerdict is one demand in the last line.
type conformVerdict struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

// printVerdicts prints a table and, as the last line, the result as JSON. A
// demand that could not be looked at is no failure; its detail says why.
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
			word, detail = "not applicable", "not applicable: "+v.Skipped
			cases.Tried--
			cases.Skipped++
		case v.Err != nil:
			word, detail = "FAIL", strings.ReplaceAll(v.Err.Error(), "\n", "; ")
			cases.Failed++
		default:
			cases.Passed++
		}
		verdicts = append(verdicts, conformVerdict{fmt.Sprintf("%d %s", v.Must.Number, v.Must.Says), v.Err == nil, detail})
		if !only {
			fmt.Fprintf(w, "%d\t%s\t%s\t%s\n", v.Must.Number, word, v.Must.Says, strings.TrimPrefix(detail, "not applicable: "))
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
