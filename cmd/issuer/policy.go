package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// firstPolicies reads the policy folder at the start. A mistake in it matters
// only when there is no accepted policy to go on with.
func (in *issuer) firstPolicies(ctx context.Context) error {
	if in.pushed() {
		in.pushedPolicies()
		return nil
	}
	err := in.applyFolder(ctx)
	if errors.Is(err, fs.ErrNotExist) && in.registry.Current() == nil {
		return daemon.Hint(fmt.Errorf("the policies folder %s does not exist", in.cfg.Policies), "make it with the reviewed policy files, or correct policies in the configuration")
	}
	if err != nil && in.registry.Current() == nil {
		return fmt.Errorf("no policy can be put in force; next: mend the files and check them with: sallyport policy test %s\n%w", in.cfg.Policies, err)
	}
	in.ready.Set("policy", nil)
	return nil
}

// reload takes an edit of the policy folder. Proxies whose entries changed with
// it are told by their subscriptions.
func (in *issuer) reload(ctx context.Context) {
	_ = in.applyFolder(ctx) // it has said so
}

// applyFolder puts the folder in force, or keeps what is in force and makes
// the reason known: in the log, in the status, in a metric and in the audit.
func (in *issuer) applyFolder(ctx context.Context) error {
	before := in.registry.Status().PolicyRevision
	p, err := in.readFolder(ctx)
	if ctx.Err() != nil {
		return ctx.Err() // stopping, which is no refusal
	}
	if err != nil {
		in.registry.Refuse(err)
	} else if !in.sawFolder(p) {
		hash := ""
		if in.instance != "" {
			hash = p.Hash()
		}
		if _, err = in.registry.ApplyPolicies(ctx, p); err == nil {
			in.rememberFolder(hash)
		}
	}
	st := in.registry.Status()
	if err != nil {
		in.metrics.PolicyRejected().Inc()
		in.metrics.Reloads("policy", "refused").Inc()
		if st.PolicyRevision > 0 {
			in.log.Error("policy edit refused, the old stays in force", "revision", st.PolicyRevision, "err", err)
		}
		return errors.Join(err, in.audit.Append(&audit.Record{Kind: audit.KindPolicy, Decision: audit.Deny, Revision: st.PolicyRevision, Detail: err.Error()}))
	}
	in.metrics.PolicyRevision().Set(float64(st.PolicyRevision))
	in.metrics.Reloads("policy", "ok").Inc()
	if st.PolicyRevision == before {
		return nil
	}
	in.log.Info("policy in force", "revision", st.PolicyRevision, "hash", st.PolicyHash)
	return in.audit.Append(&audit.Record{Kind: audit.KindPolicy, Decision: audit.Allow, Revision: st.PolicyRevision, Detail: st.PolicyHash})
}

// readFolder parses the folder as it is at rest.
func (in *issuer) readFolder(ctx context.Context) (*mesh.Policies, error) {
	files, err := settled(ctx, in.folder.Read, in.files)
	if err != nil {
		return nil, err
	}
	in.files = files
	return in.folder.Parse(files)
}
