package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/control"
	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
)

// A pusher is what push, promote and rollback share.
type pusher struct {
	c      *cli
	td     *string
	keys   []string
	canary canaryFlags
	over   bool
	// record, inForce and revision are what the signer knows without the issuer.
	record   string
	inForce  string
	revision uint64
	wait     bool
	timeout  time.Duration
}

func (p *pusher) flags(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringSliceVar(&p.keys, "key", nil, "the file of a private key that signs the set, may be repeated")
	cmd.Flags().StringVar(&p.inForce, "in-force", "", "what is in force, if the record does not know it: a revision, the hash of a set, or none")
	cmd.Flags().StringVar(&p.record, "record", "", "the file that remembers what is signed with --key (default: ~/.local/state/"+recordFile+")")
	return p.waitFlags(cmd)
}

func (p *pusher) waitFlags(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().BoolVar(&p.wait, "wait", false, "wait until every connected proxy acts on it")
	cmd.Flags().DurationVar(&p.timeout, "timeout", time.Minute, "how long to wait, beside the bake")
	return cmd
}

// policyPush is "sallyport policy push".
func (c *cli) policyPush(td *string) *cobra.Command {
	p := &pusher{c: c, td: td}
	cmd := p.flags(&cobra.Command{
		Use: "push DIR|SET", Short: "Put a folder, or a set that is signed already, in force", Args: cobra.ExactArgs(1),
		Long: "Put a folder of policies in force, or a set that sallyport policy sign has made.\n" +
			"The issuer checks it, runs its tests and counts its signatures; it must follow on\n" +
			"the set in force. The issuer's configuration has policy.source: pushed.\n\n" +
			"With --canary only some proxies act on it at first. All follow after --bake, when\n" +
			"each of them acknowledged it; when one refuses it or is lost, they go back.",
		RunE: func(cmd *cobra.Command, args []string) error {
			info, err := os.Stat(args[0])
			if err != nil {
				return usage(err)
			}
			if err := p.canary.validate(cmd); err != nil {
				return err
			}
			if p.over && len(p.canary.group) > 0 {
				return usage(errors.New("--overtake is for a set that goes to all: leave --canary out"))
			}
			if !info.IsDir() && p.revision > 0 {
				return usage(fmt.Errorf("%s is a set, whose revision stands: leave out --revision", args[0]))
			}
			return p.run(cmd, func(_ context.Context, _ *control.Admin, g *signing) (*policyset.Signed, error) {
				if err := g.check(); err != nil {
					return nil, err
				}
				if !info.IsDir() {
					return readSet(args[0])
				}
				if ro := g.st.Rollout; ro.Active() && len(g.keys) > 0 && !p.over {
					return nil, failed(fmt.Errorf("revision %d is tried by the canary group; first: sallyport policy promote, or sallyport policy rollback", ro.Revision))
				}
				next, err := g.next()
				if err != nil {
					return nil, err
				}
				return packed(args[0], *td, next, g.st.PolicySet)
			})
		},
	})
	cmd.Flags().Uint64Var(&p.revision, "revision", 0, "the revision of the new set (default: the next, as the issuer and the record have it)")
	p.canary.flags(cmd)
	cmd.Flags().BoolVar(&p.over, "overtake", false, "end what a canary group tries")
	return cmd
}

// nextRevision is that of the next set. An issuer of an older version knows no
// canary groups.
func nextRevision(st mesh.IssuerStatus) uint64 { return cmp.Or(st.NextRevision, st.PolicyRevision+1) }

// policyRollback is "sallyport policy rollback".
func (c *cli) policyRollback(td *string) *cobra.Command {
	p := &pusher{c: c, td: td}
	return p.flags(&cobra.Command{
		Use: "rollback [REVISION]", Short: "Put an earlier set in force again, under a new revision", Args: cobra.MaximumNArgs(1),
		Long: "Put an earlier set in force again, under a new revision: revisions never go down.\n" +
			"Without REVISION, the set before the one in force. The issuer keeps the last\n" +
			"three. With --key, the earlier set must have the signature of that key too:\n" +
			"what is signed is what was signed before, whatever the issuer says.\n\n" +
			"While a canary group tries a set, rollback without REVISION takes that back, by\n" +
			"its fallback, which is signed already.",
		RunE: func(cmd *cobra.Command, args []string) error {
			revision := uint64(0)
			if len(args) > 0 {
				var err error
				if revision, err = strconv.ParseUint(args[0], 10, 64); err != nil || revision == 0 {
					return usage(fmt.Errorf("%q is not a revision: write a number from 1", args[0]))
				}
			}
			return p.run(cmd, func(ctx context.Context, a *control.Admin, g *signing) (*policyset.Signed, error) {
				if ro := g.st.Rollout; ro.Active() {
					if revision == 0 && ro.Fallback > 0 {
						return nil, p.takeBack(ctx, a, ro)
					}
					if p.over = true; revision == 0 {
						return g.still(ctx)
					}
				}
				return g.earlier(ctx, revision)
			})
		},
	})
}

// run signs and pushes the set that make returns, and waits. Without a set, make
// has done what was to do.
func (p *pusher) run(cmd *cobra.Command, make func(context.Context, *control.Admin, *signing) (*policyset.Signed, error)) error {
	if p.inForce != "" {
		if err := checkNamed(p.inForce); err != nil {
			return err
		}
	}
	keys, err := readSigners(p.keys)
	if err != nil {
		return err
	}
	return p.then(cmd, func(ctx context.Context, a *control.Admin) (uint64, error) {
		g, err := p.begin(ctx, a, keys)
		if err != nil {
			return 0, err
		}
		if g.rec != nil {
			defer g.rec.Close()
		}
		set, err := make(ctx, a, g)
		if err != nil || set == nil {
			return 0, err
		}
		return p.push(ctx, a, g, set)
	})
}

// push pushes a set, and returns its revision when a canary group tries it.
func (p *pusher) push(ctx context.Context, a *control.Admin, g *signing, set *policyset.Signed) (revision uint64, err error) {
	back, err := p.canary.back(ctx, g, set)
	if err != nil {
		return 0, err
	}
	if err := g.sign(set, back); err != nil {
		return 0, err
	}
	req := control.PolicyPush{Set: set.Encode(), Group: p.canary.group, Overtake: p.over}
	if back != nil {
		req.Fallback = back.Encode()
		fmt.Fprintf(p.c.stderr, "revision %d, to go back by, says what revision %d says, set %s\n", back.Revision, g.st.PolicyRevision, g.st.PolicySet)
	}
	if len(req.Group) > 0 {
		req.Bake = p.canary.bake
	}
	if err := a.PushPolicy(ctx, req); err != nil {
		return 0, err
	}
	where, state := "is in force on the issuer", inForce
	if len(req.Group) > 0 {
		where, state, revision = "is tried by the canary group", tried, set.Revision
	}
	fmt.Fprintf(p.c.stderr, "revision %d %s, set %s, %d signatures\n", set.Revision, where, set.Hash(), len(set.Keys()))
	return revision, g.taken(set, state)
}

// then does something, shows how far it has come, and waits. What it tries is
// waited for to its end.
func (p *pusher) then(cmd *cobra.Command, do func(context.Context, *control.Admin) (tried uint64, err error)) error {
	if p.timeout <= 0 {
		return usage(fmt.Errorf("--timeout %s is too short: write a time such as 30s", p.timeout))
	}
	var d distribution
	err := p.c.with(cmd, "sallyport policy status", func(ctx context.Context, a *control.Admin) error {
		tried, err := do(ctx, a)
		if err == nil {
			d, err = awaitPolicies(ctx, a, p.wait, p.timeout, tried)
		}
		return err
	})
	if err == nil {
		err = p.c.emitDistribution(d)
	}
	if err == nil && p.wait {
		err = d.failure(p.timeout)
	}
	return err
}
