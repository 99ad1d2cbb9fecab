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
		Fill:     (*Config).fill,
		Takeover: true,
		Serve: func(ctx context.Context, c *Config, r daemon.Run) error {
			daemon.Conceal()
			return serve(ctx, c, r.Takeover, stderr)
		},
	}.Execute(ctx, args, stdout, stderr)
}
