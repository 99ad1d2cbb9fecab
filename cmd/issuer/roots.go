package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/audit"
	"sallyport/internal/ca"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// returning is how long after its start the issuer does not speak of the proxies
// that live: the slowest takes this long to come back.
const returning = time.Minute

// holders are the live proxies as the CA sees them: those that are connected,
// and those that are not but whose SVIDs still open doors.
func holders(proxies []mesh.Proxy, now time.Time) []ca.Holder {
	var out []ca.Holder
	for _, p := range proxies {
		if !p.Connected && !now.Before(p.SVIDExpires) {
			continue
		}
		h := ca.Holder{Name: p.Workload.String()}
		if !p.Connected {
			h.Name += " (not connected)"
		}
		if a := p.Authorities; a != nil {
			h.Trusts, h.Shows = a.Trusts, a.Shows
		}
		out = append(out, h)
	}
	return out
}

// holders is ca.Config.Holders.
func (in *issuer) holders() ([]ca.Holder, bool) {
	now := time.Now()
	if in.registry == nil {
		return nil, false
	}
	return holders(in.registry.Proxies(), now), now.Sub(in.started) >= min(returning, in.cfg.CA.X509TTL)
}

// TaintedX509 is control.RootKeeper.
func (a *authority) TaintedX509() []*x509.Certificate { return a.ca.Bundle().Tainted }

// Roots is control.RootKeeper.
func (a *authority) Roots() control.RootStatus { return rootStatus(a.ca.Rotation()) }

// MoveRoots is control.RootKeeper.
func (a *authority) MoveRoots(ctx context.Context, m control.Move, force, through bool) (control.RootStatus, error) {
	var r ca.Rotation
	var err error
	switch m {
	case control.MoveRotate:
		pace := ca.ByHand
		if through {
			pace = ca.AtOnce
		}
		r, err = a.ca.Rotate(ctx, pace, force)
	case control.MoveRollback:
		r, err = a.ca.Rollback(ctx)
	case control.MoveEmergency:
		r, err = a.ca.Emergency(ctx)
	default:
		err = fmt.Errorf("no move is called %q", m)
	}
	return rootStatus(r), err
}

// MoveAuthority is control.RootKeeper.
func (a *authority) MoveAuthority(ctx context.Context, kind, step, id string) (control.RootStatus, error) {
	move := a.ca.MoveRoot
	if kind == control.KindJWT {
		move = a.ca.MoveJWT
	}
	r, err := move(ctx, ca.Step(step), id)
	switch {
	case errors.Is(err, ca.ErrUnknown):
		err = control.Unfit(err)
	case errors.Is(err, ca.ErrGate):
		err = control.Unready(err)
	}
	return rootStatus(r), err
}

func rootStatus(r ca.Rotation) control.RootStatus {
	st := control.RootStatus{
		Phase: string(r.Phase), Pace: string(r.Pace), Since: r.Since, Emergency: r.Emergency,
		Next: string(r.Gate.Step), Confirmed: r.Gate.Confirmed, Live: r.Gate.Live, Stragglers: r.Gate.Stragglers,
		IssuersConfirmed: r.Gate.IssuersConfirmed, IssuersLive: r.Gate.IssuersLive,
		Known: r.Gate.Known, NotBefore: r.Gate.NotBefore, Due: r.Due,
	}
	for _, x := range r.Roots {
		next := r.Phase == ca.Prepared && !x.Signs
		st.Authorities = append(st.Authorities, control.AuthorityStatus{ID: x.ID, Kind: control.KindX509, SubjectKeyID: x.SubjectKeyID, Expires: x.Expires, Signs: x.Signs, Next: next, Tainted: x.Tainted})
	}
	for _, x := range r.Intermediates {
		st.Authorities = append(st.Authorities, control.AuthorityStatus{ID: x.ID, Kind: control.KindIntermediate, SubjectKeyID: x.RootKeyID, Expires: x.Expires, Signs: x.Signs, Next: x.Next})
	}
	for _, k := range r.JWT {
		st.Authorities = append(st.Authorities, control.AuthorityStatus{ID: k.KeyID, Kind: control.KindJWT, Expires: k.ExpiresAt, Signs: k.KeyID == r.KeyID, Next: k.KeyID == r.NextKeyID, Tainted: k.Tainted})
	}
	return st
}

// caCommand is "issuer ca", for a CA whose issuer cannot start any more.
func caCommand(load func() (*Config, error), stdout io.Writer) *cobra.Command {
	cmd := &cobra.Command{Use: "ca", Short: "About the CA of an issuer that does not run"}
	var emergency bool
	rotate := &cobra.Command{
		Use: "rotate --emergency", Short: "Make a new root after the old one has expired", Args: cobra.NoArgs,
		Long: "Make a new root after the old one has expired. Nothing signed under the old\n" +
			"root is good any more, so no proxy is asked. Each proxy must be given the new\n" +
			"bundle.pem as its issuer.bundle and then be restarted. While the issuer runs,\n" +
			"use: sallyport ca rotate.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !emergency {
				return daemon.Hint(daemon.Exit(daemon.Usage, errors.New("an issuer that does not run asks no proxy")), "issuer ca rotate --emergency --config FILE, or sallyport ca rotate while it runs")
			}
			cfg, err := load()
			if err != nil {
				return err
			}
			log, _ := daemon.NewLogger(cmd.ErrOrStderr(), "warn", false)
			return replaceRoot(cmd.Context(), cfg, log, stdout)
		},
	}
	rotate.Flags().BoolVar(&emergency, "emergency", false, "say that this is meant")
	cmd.AddCommand(rotate)
	return cmd
}

func replaceRoot(ctx context.Context, cfg *Config, log *slog.Logger, stdout io.Writer) (err error) {
	if _, err := os.Stat(filepath.Join(cfg.DataDir, "ca", "state.json")); err != nil {
		return daemon.Hint(fmt.Errorf("there is no CA in %s: %w", cfg.DataDir, err), "check data_dir")
	}
	if cfg.CA.Upstream.Kind != "" {
		return daemon.Hint(errors.New("the root is that of the upstream authority"), "move the directory ca aside, start the issuer, and give every proxy the new bundle.pem")
	}
	records, err := audit.Open(audit.Config{Path: filepath.Join(cfg.DataDir, "audit.jsonl"), Log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, records.Sync(ctx), records.Close()) }()
	pass, err := passphrase(cfg.CA.PassphraseFile)
	if err != nil {
		return err
	}
	c, err := ca.Replace(ctx, ca.Config{
		TrustDomain: cfg.TrustDomain, Dir: filepath.Join(cfg.DataDir, "ca"), Passphrase: pass, KMS: cfg.CA.KMS,
		X509TTL: cfg.CA.X509TTL, JWTTTL: cfg.CA.JWTTTL, AllowShort: cfg.CA.AllowShortTTL, Audit: records, Log: log,
	})
	if err != nil {
		return err
	}
	defer c.Close()
	bundle := filepath.Join(cfg.DataDir, "bundle.pem")
	if err := daemon.WriteFile(bundle, bundlePEM(c), 0o644); err != nil {
		return err
	}
	root := c.Bundle().X509[0]
	fmt.Fprintf(stdout, "new root %.16s, until %s\nnext: start the issuer; copy %s to each proxy as its issuer.bundle and restart it\n",
		ca.RootID(root), root.NotAfter.UTC().Format(time.RFC3339), bundle)
	return nil
}
