package main

import (
	"context"
	"io"

	"sallyport/internal/daemon"
)

// run executes one command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	return daemon.CommandLine[Config]{
		Name: "gateway", Short: "The only way out of the mesh",
		Fill:  (*Config).fill,
		Serve: func(ctx context.Context, c *Config, _ []string) error { return serve(ctx, c, stderr) },
	}.Execute(ctx, args, stdout, stderr)
}
