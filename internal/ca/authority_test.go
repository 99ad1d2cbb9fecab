package ca

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

func step(t *testing.T, move func() (Rotation, error), want error, text string) Rotation {
	t.Helper()
	r, err := move()
	if !errors.Is(err, want) || err != nil && !strings.Contains(err.Error(), text) {
		t.Fatalf("got %v, want %v with %q", err, want, text)
	}
	return r
}

func TestOneStepOfTheRootByName(t *testing.T) {
	f, now := new(fleet), time.Now()
	cfg := inFleet(config(t), f)
	cfg.Now = func() time.Time { return now }
	c := open(t, cfg)
	f.sync(c, true, "p")
	root := func(s Step, id string) func() (Rotation, error) {
		return func() (Rotation, error) { return c.MoveRoot(t.Context(), s, id) }
	}
	old := RootID(c.Bundle().X509[0])
	step(t, root(StepActivate, old), ErrUnknown, "not a root that waits")
	young := step(t, root(StepPrepare, ""), nil, "").Roots[1].ID
	step(t, root(StepPrepare, ""), ErrGate, "prepare is not next but activate")
	step(t, root(StepActivate, young), ErrGate, "0 of 1 proxies")
	if err := c.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.sync(c, false, "p")
	step(t, root(StepActivate, old), ErrUnknown, "")
	step(t, root(StepTaint, young), ErrGate, "taint is not next")
	step(t, root(StepActivate, young), nil, "")
	f.sync(c, false, "p")
	step(t, root(StepTaint, young), ErrUnknown, "")
	step(t, root(StepTaint, old), nil, "")
	step(t, root(StepRevoke, old), ErrGate, "")
	f.sync(c, true, "p")
	now = now.Add(10 * time.Minute)
	step(t, root(StepRevoke, old), nil, "")
	phase(t, c, Steady, 1, 0)

	// What a rollback rejects is revoked by the same name.
	young = step(t, root(StepPrepare, ""), nil, "").Roots[1].ID
	if err := c.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.sync(c, false, "p")
	step(t, root(StepActivate, young), nil, "")
	if _, err := c.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.sync(c, true, "p")
	now = now.Add(10 * time.Minute)
	step(t, root(StepRevoke, young), nil, "")
	phase(t, c, Steady, 1, 0)
}

func TestOneStepOfASharedRootByName(t *testing.T) {
	e := newEnsemble(t, "a", "b")
	e.sync(true, "p")
	a, b, old := e.cas["a"], e.cas["b"], e.roots("a")[0]
	young := step(t, func() (Rotation, error) { return a.MoveRoot(t.Context(), StepPrepare, "") }, nil, "").Roots[1].ID
	step(t, func() (Rotation, error) { return b.MoveRoot(t.Context(), StepActivate, old) }, ErrUnknown, "")
	step(t, func() (Rotation, error) { return b.MoveRoot(t.Context(), StepActivate, young) }, ErrGate, "of 2 issuers")
	e.round()
	e.sync(false, "p")
	step(t, func() (Rotation, error) { return b.MoveRoot(t.Context(), StepActivate, young) }, nil, "")
	e.round()
	e.all(Activated, young, old)
}

func TestOneStepOfTheJWTKeyByName(t *testing.T) {
	f := new(fleet)
	cfg := inFleet(config(t), f)
	c := open(t, cfg)
	f.sync(c, true, "p")
	jwt := func(s Step, id string) func() (Rotation, error) {
		return func() (Rotation, error) { return c.MoveJWT(t.Context(), s, id) }
	}
	old := c.Status().KeyID
	step(t, jwt(StepTaint, old), ErrUnknown, "not a JWT key that signed before")
	step(t, jwt(StepActivate, old), ErrUnknown, "not the JWT key that was prepared")
	young := step(t, jwt(StepPrepare, ""), nil, "").NextKeyID
	if again := step(t, jwt(StepPrepare, ""), nil, "").NextKeyID; again != young || young == "" {
		t.Errorf("prepared %q, then %q", young, again)
	}
	step(t, jwt(StepActivate, young), ErrGate, "0 of 1 proxies")
	f.sync(c, false, "p")
	if r := step(t, jwt(StepActivate, young), nil, ""); r.KeyID != young || r.NextKeyID != "" {
		t.Errorf("signs with %q, next %q", r.KeyID, r.NextKeyID)
	}
	step(t, jwt(StepRevoke, old), ErrGate, "not tainted")
	step(t, jwt(StepTaint, old), nil, "")
	tainted := func() bool {
		return slices.ContainsFunc(c.Bundle().JWT, func(k JWTKey) bool { return k.KeyID == old && k.Tainted })
	}
	if !tainted() {
		t.Error("the old key is not tainted")
	}
	c.Close()
	c = open(t, cfg)
	if !tainted() {
		t.Error("after a restart the old key is not tainted")
	}
	step(t, jwt(StepRevoke, old), nil, "")
	if n := len(c.Bundle().JWT); n != 1 {
		t.Errorf("%d JWT keys are left", n)
	}
	rotateNow(t, c, true)
	step(t, jwt(StepPrepare, ""), ErrGate, "takes the JWT key along")
}
