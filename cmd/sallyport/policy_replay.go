package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/mesh"
	"sallyport/internal/review"
)

// policyReplay is "sallyport policy replay".
func (c *cli) policyReplay(td *string) *cobra.Command {
	var was, env string
	cmd := &cobra.Command{
		Use:   "replay DIR EXPORT...",
		Short: "List the recorded decisions that DIR would make otherwise",
		Long: "List the recorded decisions that DIR would make otherwise. EXPORT are audit logs\n" +
			"in native JSON lines, - for standard input. A log keeps no tokens and no server\n" +
			"names: what depends on them is listed as such, unless --was names the policies\n" +
			"that were in force, whose conditions held when they allowed a call.",
		Args: cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := parsePolicies(args[0], *td)
			if err != nil {
				return err
			}
			var old *mesh.Policies
			if was != "" {
				if old, err = parsePolicies(was, *td); err != nil {
					return fmt.Errorf("--was: %w", err)
				}
			}
			t, err := readTraffic(args[1:])
			if err != nil {
				return err
			}
			rs, err := review.Replay(p, old, env, t)
			if err != nil {
				return failed(err)
			}
			return c.replayed(rs, t)
		},
	}
	cmd.Flags().StringVar(&was, "was", "", "the folder of the policies that were in force")
	cmd.Flags().StringVar(&env, "env", "", "the environment of the proxies, which env.name= compares with")
	return cmd
}

// readTraffic reads audit logs.
func readTraffic(files []string) (*review.Traffic, error) {
	t := new(review.Traffic)
	for _, name := range files {
		if name == "-" {
			if err := t.Read(os.Stdin); err != nil {
				return nil, failed(fmt.Errorf("standard input: %w", err))
			}
			continue
		}
		f, err := os.Open(name)
		if err != nil {
			return nil, usage(err)
		}
		err = t.Read(f)
		f.Close()
		if err != nil {
			return nil, failed(fmt.Errorf("%s: %w", name, err))
		}
	}
	if len(t.Observed) == 0 {
		return nil, failed(errors.New("no record in these logs says how a call was decided"))
	}
	return t, nil
}

func (c *cli) replayed(rs []review.Replayed, t *review.Traffic) error {
	if c.format == "json" {
		if rs == nil {
			rs = []review.Replayed{}
		}
		return c.emit(map[string]any{"changed": rs, "kinds": len(t.Observed), "vague": t.Vague}, nil, nil)
	}
	var calls uint64
	depends := 0
	for i := range rs {
		r := &rs[i]
		was := "denied"
		if r.Allowed {
			was = "allowed"
		}
		if r.Rule != "" {
			was += " by " + r.Rule
		}
		fmt.Fprintf(c.stdout, "now %-7s  %s\n             %s, last %s, id %s: was %s", r.Now, &r.Observed,
			count(int(r.Calls), "call"), r.Last.UTC().Format(time.RFC3339), r.Example, was)
		if r.Now == review.Depends {
			depends++
			fmt.Fprintf(c.stdout, ", row %s depends on %s\n", r.Is, strings.Join(r.On, ", "))
			continue
		}
		fmt.Fprintf(c.stdout, ", is %s\n", r.Is)
		calls += r.Calls
	}
	fmt.Fprintf(c.stdout, "%d of %d kinds of calls change, %s", len(rs)-depends, len(t.Observed), count(int(calls), "recorded call"))
	if depends > 0 {
		fmt.Fprintf(c.stdout, "; %d depend on what the log does not have", depends)
	}
	if t.Vague > 0 {
		fmt.Fprintf(c.stdout, "; %s out of the mesh are counted without their destination", count(int(t.Vague), "refusal"))
	}
	fmt.Fprintln(c.stdout)
	return nil
}

// policySuggest is "sallyport policy suggest".
func (c *cli) policySuggest(td *string) *cobra.Command {
	var denied bool
	var into string
	cmd := &cobra.Command{
		Use:   "suggest DIR EXPORT...",
		Short: "Propose least-privilege rows for the traffic in audit logs, as a file to review",
		Long: "Propose least-privilege rows for the traffic in audit logs, as a file to review.\n" +
			"Callers and destinations are those that were seen, never a pattern; a path is\n" +
			"generalised where the log counts paths together, by one * for a segment;\n" +
			"conditions are those of the row of DIR that allowed the call. A row in doubt is\n" +
			"a comment.",
		Args: cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := parsePolicies(args[0], *td)
			if err != nil {
				return err
			}
			t, err := readTraffic(args[1:])
			if err != nil {
				return err
			}
			ss := review.Suggest(p, t, denied)
			if c.format == "json" {
				return c.emit(ss, nil, nil)
			}
			if into == "" {
				return writeSuggestions(c.stdout, ss)
			}
			if _, err := os.Lstat(into); err == nil {
				return usage(fmt.Errorf("--write %s: it exists; a suggestion never replaces a reviewed file", into))
			}
			f, err := os.OpenFile(filepath.Clean(into), os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
			if err != nil {
				return usage(err)
			}
			return failed(errors.Join(writeSuggestions(f, ss), f.Close()))
		},
	}
	cmd.Flags().BoolVar(&denied, "denied", false, "propose rows for calls that no row allowed, too")
	cmd.Flags().StringVar(&into, "write", "", "write a new file instead of standard output")
	return cmd
}

// writeSuggestions writes rows in the form of access.csv.
func writeSuggestions(w io.Writer, ss []review.Suggestion) error {
	b := bufio.NewWriter(w)
	fmt.Fprintln(b, "# Rows for the traffic that was observed. Review each one: that a call was made")
	fmt.Fprintln(b, "# does not mean that it should be possible.")
	src := ""
	for i := range ss {
		x := &ss[i]
		if x.Rule.Src != src {
			src = x.Rule.Src
			fmt.Fprintf(b, "\n# --- %s\n", oneLine(src))
		}
		fmt.Fprintf(b, "# %s; today: %s\n", count(int(x.Calls), "call"), oneLine(strings.Join(x.Today, ", ")))
		if x.Doubt != "" {
			fmt.Fprintf(b, "# IN DOUBT: %s\n# ", oneLine(x.Doubt))
		}
		fmt.Fprintln(b, oneLine(x.Rule.Row()))
	}
	return b.Flush()
}

// oneLine keeps a text from a log on the line that it stands in.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
}
