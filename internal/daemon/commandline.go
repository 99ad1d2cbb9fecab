package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

// TakeoverFlag is the flag of "run" that asks to take over from a process that
// runs.
const TakeoverFlag = "takeover"

// A CommandLine is that of a program that serves: "run" and "config show" on a
// configuration of type C, and "man".
type CommandLine[C any] struct {
	// Name and Short introduce the program. Required.
	Name, Short string
	// Fill sets the defaults of a configuration that was read. Required.
	Fill func(*C)
	// Serve runs the program. Required.
	Serve func(ctx context.Context, cfg *C, run Run) error
	// Program says that run takes a program behind "--", Takeover that it can
	// take over from a process that runs, Isolate that it can put the program
	// into a network namespace.
	Program, Takeover, Isolate bool
	// More adds commands that need the configuration.
	More func(load func() (*C, error)) []*cobra.Command
}

// A Run is what the command line of "run" says beside the configuration.
type Run struct {
	// Program is what stood behind "--".
	Program []string
	// Takeover asks to take over from the process that runs, if one does.
	Takeover bool
	// Isolate asks for a network namespace of the program's own.
	Isolate bool
}

// Execute runs one command line. A mistake on it has the exit code Usage.
func (l CommandLine[C]) Execute(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var file, level string
	var pprof bool
	load := func() (*C, error) {
		if file == "" {
			return nil, Hint(Exit(Usage, errors.New("no configuration given")), l.example())
		}
		flags := map[string]string{}
		if level != "" {
			flags["log.level"] = level
		}
		if pprof {
			flags["pprof"] = "true"
		}
		c := new(C)
		if err := LoadConfig(file, os.Environ(), flags, c); err != nil {
			return nil, err
		}
		l.Fill(c)
		return c, nil
	}
	root := &cobra.Command{Use: l.Name, Short: l.Short, SilenceUsage: true, SilenceErrors: true, DisableSuggestions: true}
	root.PersistentFlags().StringVar(&file, "config", "", "the configuration file (YAML)")
	root.PersistentFlags().StringVar(&level, "log-level", "", "debug, info, warn or error")
	root.PersistentFlags().BoolVar(&pprof, "pprof", false, "serve profiles on the admin socket, below /debug/pprof/")
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return Hint(Exit(Usage, err), c.CommandPath()+" --help")
	})
	config := &cobra.Command{
		Use: "config", Short: "About the configuration", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	config.AddCommand(showCommand(load, stdout))
	root.AddCommand(l.run(load, &file, stdout), config, Manual(8))
	if l.More != nil {
		root.AddCommand(l.More(load)...)
	}
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err != nil && (strings.HasPrefix(err.Error(), "unknown command") || strings.HasPrefix(err.Error(), "accepts ")) {
		return Hint(Exit(Usage, err), l.Name+" --help")
	}
	return err
}

// showCommand is "config show".
func showCommand[C any](load func() (*C, error), stdout io.Writer) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "show", Short: "Print the effective configuration, secrets masked", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			c, err := load()
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(stdout).Encode(Masked(c))
			}
			return Show(stdout, c)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print it as JSON, for other programs")
	return cmd
}

func (l CommandLine[C]) example() string {
	if l.Program {
		return l.Name + " run --config FILE -- PROGRAM ARGS"
	}
	return l.Name + " run --config FILE"
}

// run is the command "run".
func (l CommandLine[C]) run(load func() (*C, error), file *string, stdout io.Writer) *cobra.Command {
	var check, takeover, isolate bool
	cmd := &cobra.Command{
		Use: "run", Short: "Serve until a signal ends it", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, program []string) error {
			c, err := load()
			if err != nil {
				return err
			}
			if len(program) > 0 && cmd.ArgsLenAtDash() != 0 {
				return Hint(Exit(Usage, fmt.Errorf("unexpected argument %q", program[0])), "put the program after --: "+l.example())
			}
			if check {
				fmt.Fprintf(stdout, "%s: ok\n", *file)
				return nil
			}
			return l.Serve(cmd.Context(), c, Run{Program: program, Takeover: takeover, Isolate: isolate})
		},
	}
	if l.Program {
		cmd.Use, cmd.Short, cmd.Args = "run [-- PROGRAM ARGS...]", "Serve until a signal ends it, or until PROGRAM ends", cobra.ArbitraryArgs
		cmd.Long = "Serve the workload. With a program after --, start it once its identity is\n" +
			"there, with the proxy environment set; pass signals on; end with its status."
	}
	cmd.Flags().BoolVar(&check, "check-config", false, "validate the configuration and exit")
	if l.Takeover {
		cmd.Flags().BoolVar(&takeover, TakeoverFlag, false, "take the sockets over from the process that runs, which finishes what it carries")
	}
	if l.Isolate {
		cmd.Flags().BoolVar(&isolate, "isolate", false, "give PROGRAM a network namespace of its own, whose only way out is this process")
	}
	return cmd
}
