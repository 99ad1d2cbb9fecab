package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"sallyport/internal/daemon"
)

// run executes one command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var file, level string
	load := func() (*Config, error) {
		var c Config
		flags := map[string]string{}
		if level != "" {
			flags["log.level"] = level
		}
		if file == "" {
			return nil, daemon.Hint(daemon.Exit(daemon.Usage, fmt.Errorf("no configuration given")), "issuer run --config FILE")
		}
		if err := daemon.LoadConfig(file, os.Environ(), flags, &c); err != nil {
			return nil, err
		}
		c.fill()
		return &c, nil
	}
	root := &cobra.Command{Use: "issuer", Short: "The control plane and signer of a trust domain", SilenceUsage: true, SilenceErrors: true, DisableSuggestions: true}
	root.PersistentFlags().StringVar(&file, "config", "", "the configuration file (YAML)")
	root.PersistentFlags().StringVar(&level, "log-level", "", "debug, info, warn or error")
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return daemon.Hint(daemon.Exit(daemon.Usage, err), c.CommandPath()+" --help")
	})
	var check bool
	runCmd := &cobra.Command{
		Use: "run", Short: "Serve until a signal ends it", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := load()
			if err != nil {
				return err
			}
			if check {
				fmt.Fprintf(stdout, "%s: ok\n", file)
				return nil
			}
			return serve(cmd.Context(), c, stderr)
		},
	}
	runCmd.Flags().BoolVar(&check, "check-config", false, "validate the configuration and exit")
	config := &cobra.Command{
		Use: "config", Short: "About the configuration", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	config.AddCommand(&cobra.Command{
		Use: "show", Short: "Print the effective configuration, secrets masked", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			c, err := load()
			if err != nil {
				return err
			}
			return daemon.Show(stdout, c)
		},
	})
	root.AddCommand(runCmd, config, caCommand(load, stdout))
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err != nil && strings.HasPrefix(err.Error(), "unknown command") {
		return daemon.Hint(daemon.Exit(daemon.Usage, err), "issuer --help")
	}
	return err
}
