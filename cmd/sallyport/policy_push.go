package main

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/control"
	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
)

// signers are the keys that sign a set.
type signers []ed25519.PrivateKey

func (k signers) sign(s *policyset.Signed) {
	for _, key := range k {
		s.Sign(key)
	}
}

// A pusher is what push, promote and rollback share.
type pusher struct {
	c       *cli
	keys    []string
	canary  canaryFlags
	over    bool
	wait    bool
	timeout time.Duration
}

func (p *pusher) flags(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringSliceVar(&p.keys, "key", nil, "the file of a private key that signs the set, may be repeated")
	return p.waitFlags(cmd)
}

func (p *pusher) waitFlags(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().BoolVar(&p.wait, "wait", false, "wait until every connected proxy acts on it")
	cmd.Flags().DurationVar(&p.timeout, "timeout", time.Minute, "how long to wait, beside the bake")
	return cmd
}

// policyPush is "sallyport policy push".
func (c *cli) policyPush(td *string) *cobra.Command {
	p := &pusher{c: c}
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
			return p.run(cmd, func(_ context.Context, _ *control.Admin, st mesh.IssuerStatus, _ signers) (*policyset.Signed, error) {
				if !info.IsDir() {
					return readSet(args[0])
				}
				return packed(args[0], *td, nextRevision(st), st.PolicySet)
			})
		},
	})
	p.canary.flags(cmd)
	cmd.Flags().BoolVar(&p.over, "overtake", false, "end what a canary group tries")
	return cmd
}

// nextRevision is that of the next set. An issuer of an older version knows no
// canary groups.
func nextRevision(st mesh.IssuerStatus) uint64 { return cmp.Or(st.NextRevision, st.PolicyRevision+1) }

// policyRollback is "sallyport policy rollback".
func (c *cli) policyRollback() *cobra.Command {
	p := &pusher{c: c}
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
			return p.run(cmd, func(ctx context.Context, a *control.Admin, st mesh.IssuerStatus, keys signers) (*policyset.Signed, error) {
				if ro := st.Rollout; ro.Active() {
					if revision == 0 && ro.Fallback > 0 {
						return nil, p.takeBack(ctx, a, ro)
					}
					// What is in force for the fleet, for the canary group too.
					p.over, revision = true, cmp.Or(revision, st.PolicyRevision)
				}
				return again(ctx, a, st, revision, keys)
			})
		},
	})
}

// again makes the set that follows on the one in force and says what an
// earlier one says.
func again(ctx context.Context, a *control.Admin, st mesh.IssuerStatus, revision uint64, keys signers) (*policyset.Signed, error) {
	b, err := a.PolicySet(ctx, revision)
	if err != nil {
		return nil, err
	}
	old, err := policyset.Parse(b)
	if err != nil {
		return nil, err
	}
	if revision != 0 && old.Revision != revision {
		return nil, fmt.Errorf("the issuer sends revision %d instead of %d", old.Revision, revision)
	}
	for _, k := range keys {
		if pin := policyset.KeyOf(k.Public().(ed25519.PublicKey)); !slices.Contains(old.Keys(), pin) {
			return nil, fmt.Errorf("revision %d is not signed by %s, so that what it says is the issuer's word alone: review the folder and push it", old.Revision, pin)
		}
	}
	set, err := policyset.New(policyset.Set{
		TrustDomain: old.TrustDomain, Revision: nextRevision(st), Previous: st.PolicySet,
		Created: time.Now().UTC().Truncate(time.Second), Files: old.Files,
	})
	if err != nil {
		return nil, err
	}
	return set, checkedSet(set)
}

// run signs and pushes the set that make returns, and waits. Without a set, make
// has done what was to do.
func (p *pusher) run(cmd *cobra.Command, make func(context.Context, *control.Admin, mesh.IssuerStatus, signers) (*policyset.Signed, error)) error {
	var keys signers
	for _, file := range p.keys {
		k, err := readKey(file)
		if err != nil {
			return usage(err)
		}
		keys = append(keys, k)
	}
	return p.then(cmd, func(ctx context.Context, a *control.Admin) (uint64, error) {
		st, err := a.Status(ctx)
		if err != nil {
			return 0, err
		}
		set, err := make(ctx, a, st, keys)
		if err != nil || set == nil {
			return 0, err
		}
		return p.push(ctx, a, st, set, keys)
	})
}

// push pushes a set, and returns its revision when a canary group tries it.
func (p *pusher) push(ctx context.Context, a *control.Admin, st mesh.IssuerStatus, set *policyset.Signed, keys signers) (tried uint64, err error) {
	keys.sign(set)
	req := control.PolicyPush{Set: set.Encode(), Group: p.canary.group, Overtake: p.over}
	back, err := p.canary.back(ctx, a, st, set, keys)
	if err != nil {
		return 0, err
	}
	if back != nil {
		keys.sign(back)
		req.Fallback = back.Encode()
	}
	if len(req.Group) > 0 {
		req.Bake = p.canary.bake
	}
	if err := a.PushPolicy(ctx, req); err != nil {
		return 0, err
	}
	where := "is in force on the issuer"
	if len(req.Group) > 0 {
		where, tried = "is tried by the canary group", set.Revision
	}
	fmt.Fprintf(p.c.stderr, "revision %d %s, set %s, %d signatures\n", set.Revision, where, set.Hash(), len(set.Keys()))
	return tried, nil
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
