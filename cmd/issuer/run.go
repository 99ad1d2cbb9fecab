package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"sallyport/internal/daemon"
)

// run executes one command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	return daemon.CommandLine[Config]{
		Name: "issuer", Short: "The control plane and signer of a trust domain",
		Fill: (*Config).fill,
		Serve: func(ctx context.Context, c *Config, _ daemon.Run) error {
			daemon.Conceal()
			return serve(ctx, c, stderr)
		},
		More: func(load func() (*Config, error)) []*cobra.Command {
			return []*cobra.Command{caCommand(load, stdout), storeCommand(load)}
		},
	}.Execute(ctx, args, stdout, stderr)
}
