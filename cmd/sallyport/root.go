package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
)

// A cli is what every command shares.
type cli struct {
	stdout, stderr io.Writer
	socket         string
	// address and identity are those of an issuer that is elsewhere.
	address, identity string
	format            string
}

// run executes one command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	c := &cli{stdout: stdout, stderr: stderr}
	root := &cobra.Command{
		Use:           "sallyport",
		Short:         "Operate a Sallyport mesh",
		SilenceUsage:  true,
		SilenceErrors: true,
		// One sentence instead of cobra's paragraph.
		DisableSuggestions: true,
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetArgs(args)
	root.PersistentFlags().StringVar(&c.socket, "socket", defaultSocket, "the issuer's API socket")
	root.PersistentFlags().StringVar(&c.address, "address", "", "host:port of the issuer, instead of its socket; with --identity")
	root.PersistentFlags().StringVar(&c.identity, "identity", "", "the directory of the SVID to show it: svid.pem, key.pem and bundle.pem, as svid mint writes them")
	root.PersistentFlags().StringVarP(&c.format, "output", "o", "table", "table or json; of policy diff also markdown")
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return c.checkFormat(cmd) }
	root.AddCommand(c.initialize(), c.join(), c.doctor(), c.demo(), c.demoApp(), c.status(), c.policy(), c.why(), c.audit(), c.token(), c.apikey(), c.entry(), c.conform(), c.agent(), c.svid(), c.ca(), c.revoke(), c.shadow(), c.archive(), c.route(), c.rollout(), c.egress(), c.fault(), c.ejections(), c.mapCommand(), c.edges(), c.stat(), c.top(), c.page())
	root.AddCommand(c.tls(), c.id(), c.bugReport(), c.backup(), c.restore(), c.upgrade(), c.uninstall(), c.tap(), daemon.Manual(1))
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	noArgsAreUsage(root)
	err := root.ExecuteContext(ctx)
	if err != nil && strings.HasPrefix(err.Error(), "unknown command") {
		return usage(err)
	}
	return err
}

// defaultSocket is where a packaged issuer has its socket.
const defaultSocket = "/run/sallyport/issuer/api.sock"

// usage marks an error as a mistake on the command line.
func usage(err error) error {
	return daemon.Hint(&daemon.ExitError{Code: daemon.Usage, Err: err}, "sallyport --help")
}

// noArgsAreUsage turns cobra's complaints about arguments into usage errors.
func noArgsAreUsage(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return usage(fmt.Errorf("%s: %w", c.CommandPath(), err))
			}
			return nil
		}
	}
	if cmd.HasParent() && !cmd.Runnable() {
		cmd.Args = func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(fmt.Errorf("unknown command %q for %q", args[0], c.CommandPath()))
			}
			return nil
		}
		cmd.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
	}
	for _, sub := range cmd.Commands() {
		noArgsAreUsage(sub)
	}
}

// admin connects to the issuer on this machine, or to the one at --address.
func (c *cli) admin() (*control.Admin, error) {
	if c.address != "" || c.identity != "" {
		return c.remoteAdmin()
	}
	a, err := control.DialAdmin(c.socket)
	if err != nil {
		return nil, c.unreachable(err)
	}
	return a, nil
}

func (c *cli) unreachable(err error) error {
	if c.address != "" {
		return daemon.Hint(&daemon.ExitError{Code: daemon.Unreachable, Err: err}, "check --address, and that the issuer runs")
	}
	return daemon.Hint(&daemon.ExitError{Code: daemon.Unreachable, Err: fmt.Errorf("the issuer does not answer on %s: %w", c.socket, err)},
		"start it with: issuer run --config FILE, or name its socket with --socket")
}

// alsoMarkdown is the annotation of a command that knows a third format.
const alsoMarkdown = "markdown"

// checkFormat refuses a format that the command does not know, before it has
// done anything.
func (c *cli) checkFormat(cmd *cobra.Command) error {
	_, markdown := cmd.Annotations[alsoMarkdown]
	switch {
	case c.format == "table" || c.format == "json" || markdown && c.format == "markdown":
		return nil
	case markdown:
		return usage(fmt.Errorf("--output %q is not a format: use table, json or markdown", c.format))
	}
	return usage(fmt.Errorf("--output %q is not a format: use table or json", c.format))
}

// emit prints rows as a table, or v as JSON.
func (c *cli) emit(v any, header []string, rows [][]string) error {
	if c.format == "json" {
		e := json.NewEncoder(c.stdout)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, strings.Join(header, "\t"))
	for _, r := range rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	return w.Flush()
}
