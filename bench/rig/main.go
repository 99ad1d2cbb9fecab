package rig

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

// A Role is what a process does that a bench starts of itself, with the
// arguments after the role's name.
type Role func(args []string) error

// Main is the main function of a bench: measure, or the role that the first
// argument names.
func Main(name string, measure func(context.Context, io.Writer) error, roles map[string]Role) {
	if err := play(measure, roles); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}

func play(measure func(context.Context, io.Writer) error, roles map[string]Role) error {
	if len(os.Args) > 1 {
		if r := roles[os.Args[1]]; r != nil {
			return r(os.Args[2:])
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return measure(ctx, os.Stdout)
}

// At is a role at an address or a socket, its only argument.
func At(serve func(string) error) Role {
	return func(args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("%d arguments, want where to listen", len(args))
		}
		return serve(args[0])
	}
}

// Load is the role of a load process: see ServeOrders.
func Load[O, R any](carry func(o O, warm func()) R) Role {
	return At(func(socket string) error { return ServeOrders(socket, carry) })
}
