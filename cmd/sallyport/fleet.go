package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/control"
	"sallyport/internal/mesh"
)

// status is "sallyport status".
func (c *cli) status() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show each proxy: identity, SVID, policy",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := c.admin()
			if err != nil {
				return err
			}
			defer a.Close()
			st, err := a.Status(cmd.Context())
			if err != nil {
				return c.unreachable(err)
			}
			ps, err := a.Proxies(cmd.Context())
			if err != nil {
				return c.unreachable(err)
			}
			return c.printStatus(st, ps)
		},
	}
}

func (c *cli) printStatus(st mesh.IssuerStatus, ps []mesh.Proxy) error {
	rows := make([][]string, 0, len(ps))
	for _, p := range ps {
		state, seen := string(p.State), "now"
		if p.Reason != "" {
			state += " (" + firstLine(p.Reason) + ")"
		}
		if p.CandidateRefused != "" {
			state += " (candidate refused: " + firstLine(p.CandidateRefused) + ")"
		}
		if !p.Connected {
			seen = age(time.Since(p.LastSeen)) + " ago"
		}
		rows = append(rows, []string{p.Workload.String(), p.Kind, expiry(p.SVIDExpires), strconv.FormatUint(p.PolicyRevision, 10), state, seen, cmp.Or(p.Version, "-")})
	}
	if c.format == "table" {
		defer c.printHeld(ps)
		fmt.Fprintf(c.stdout, "trust domain %s, policy revision %d, hash %.12s, %d proxies\n\n", st.TrustDomain, st.PolicyRevision, st.PolicyHash, len(ps))
		if st.LastRefusal != "" {
			fmt.Fprintf(c.stdout, "the newest policy edit was REFUSED, revision %d stays in force:\n%s\n\n", st.PolicyRevision, indent(st.LastRefusal))
		}
	}
	return c.emit(map[string]any{"issuer": st, "proxies": ps}, []string{"IDENTITY", "KIND", "SVID EXPIRES", "POLICY", "STATE", "SEEN", "VERSION"}, rows)
}

// maxHeld is how much of what proxies hold against others the status tells, maxAlone
// how much of that one proxy says alone, which may err, or lie.
const maxHeld, maxAlone = 8, 2

// printHeld tells what is not called: first what most proxies say, and of that services
// and hosts that are cut off.
func (c *cli) printHeld(ps []mesh.Proxy) {
	list := mesh.SumEjections(ps)
	if len(list) == 0 {
		return
	}
	whole := func(h mesh.EjectionSum) int {
		if h.Kind == "open" {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(list, func(a, b mesh.EjectionSum) int {
		return cmp.Or(cmp.Compare(len(b.Sidecars), len(a.Sidecars)), cmp.Compare(whole(a), whole(b)))
	})
	fmt.Fprintf(c.stdout, "\nnot called:\n")
	told, alone := 0, map[string]int{}
	for _, h := range list {
		if told == maxHeld {
			break
		}
		if len(h.Sidecars) == 1 {
			if alone[h.Sidecars[0]]++; alone[h.Sidecars[0]] > maxAlone {
				continue
			}
		}
		told++
		fmt.Fprintf(c.stdout, "  %s\n", plain(h.String()))
	}
	if n := len(list) - told; n > 0 {
		fmt.Fprintf(c.stdout, "  and %d more: sallyport ejections\n", n)
	}
}

func expiry(t time.Time) string {
	if t.IsZero() {
		return "none"
	}
	if d := time.Until(t); d > 0 {
		return "in " + age(d)
	}
	return "EXPIRED"
}

// age prints a duration in its largest fitting unit.
func age(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func indent(s string) string { return "  " + strings.ReplaceAll(s, "\n", "\n  ") }

// token is "sallyport token".
func (c *cli) token() *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Tokens with which a new node joins"}
	var ttl time.Duration
	var join []string
	create := &cobra.Command{
		Use:   "create AGENT",
		Short: "Make a single-use token for the node called AGENT",
		Long: "Make a single-use join token. The node that uses it becomes the agent\n" +
			"spiffe://<trust domain>/spire/agent/join_token/AGENT; entries name it as parent_id.\n\n" +
			"With --join an invitation is printed, which holds the token, where the issuer\n" +
			"is, and the fingerprint of its root: sallyport join takes it on the node.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !agentName.MatchString(args[0]) {
				return usage(fmt.Errorf("%q is not an agent name: use letters, digits, dot, dash and underscore", args[0]))
			}
			if ttl < time.Second {
				return usage(fmt.Errorf("--ttl %s is too short: use at least 1s", ttl))
			}
			for _, addr := range join {
				if err := checkDial(addr); err != nil {
					return usage(fmt.Errorf("--join: %w", err))
				}
			}
			a, err := c.admin()
			if err != nil {
				return err
			}
			defer a.Close()
			tok, err := a.CreateJoinToken(cmd.Context(), args[0], ttl)
			if err != nil {
				return c.unreachable(err)
			}
			said := tok.Value
			if len(join) > 0 {
				if said, err = invite(cmd.Context(), a, args[0], tok, join); err != nil {
					return c.failed(err, "sallyport token create "+args[0])
				}
			}
			if c.format == "json" {
				return c.emit(map[string]any{"token": said, "agent": tok.Agent, "expires": tok.Expires.UTC()}, nil, nil)
			}
			fmt.Fprintln(c.stdout, said)
			fmt.Fprintf(c.stderr, "for %s, valid once, until %s\n", tok.Agent, tok.Expires.UTC().Format(time.RFC3339))
			return nil
		},
	}
	create.Flags().DurationVar(&ttl, "ttl", 10*time.Minute, "how long the token may wait to be used")
	create.Flags().StringSliceVar(&join, "join", nil, "host:port at which the node reaches an issuer; print an invitation for sallyport join")
	cmd.AddCommand(create)
	return cmd
}

// invite makes an invitation of a token.
func invite(ctx context.Context, a *control.Admin, agent string, tok control.Token, issuers []string) (string, error) {
	td := tok.Agent.TrustDomain()
	b, err := a.Bundle(ctx, td)
	if err != nil {
		return "", err
	}
	return invitation{TrustDomain: td, Issuers: issuers, Roots: fingerprints(b), Agent: agent, Token: tok.Value}.text()
}

// entry is "sallyport entry".
func (c *cli) entry() *cobra.Command {
	cmd := &cobra.Command{Use: "entry", Short: "Which workload gets which identity"}
	cmd.AddCommand(&cobra.Command{
		Use:   "list",
		Short: "List the registration entries in force",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := c.admin()
			if err != nil {
				return err
			}
			defer a.Close()
			es, err := a.Entries(cmd.Context())
			if err != nil {
				return c.unreachable(err)
			}
			rows := make([][]string, 0, len(es))
			for _, e := range es {
				sel := make([]string, len(e.Selectors))
				for i, s := range e.Selectors {
					sel[i] = s.String()
				}
				rows = append(rows, []string{e.SPIFFEID.String(), e.ParentID.Path(), strings.Join(sel, " "), e.ID})
			}
			return c.emit(es, []string{"IDENTITY", "PARENT", "SELECTORS", "ENTRY"}, rows)
		},
	}, c.entryShow(), c.entryCreate(), c.entryDelete())
	return cmd
}
