package main

import (
	"context"
	"io"

	"sallyport/internal/daemon"
)

// run executes one command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	return daemon.CommandLine[Config]{
		Name: "sidecar", Short: "Identity and mutual TLS for the workload beside it",
		Fill: (*Config).fill, Program: true, Takeover: true, Isolate: true, More: captureCommands(stdout),
		Serve: func(ctx context.Context, c *Config, r daemon.Run) error {
			if !r.Isolate {
				daemon.Conceal()
			}
			return serve(ctx, c, r, stdout, stderr)
		},
	}.Execute(ctx, args, stdout, stderr)
}
