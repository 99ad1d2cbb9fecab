package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// mighty are the capabilities with which a container gets around the sidecar: it
// changes the rules, sends what they do not see, becomes the sidecar's user, or
// looks into the sidecar.
var mighty = []string{
	"ALL", "NET_ADMIN", "NET_RAW", "SETUID", "SETGID", "SETPCAP", "SETFCAP", "SYS_ADMIN", "SYS_PTRACE",
	"SYS_MODULE", "SYS_RAWIO", "BPF", "PERFMON", "DAC_READ_SEARCH",
}

// without are those of them that a container has which does not drop them.
var without = []string{"NET_RAW", "SETUID", "SETGID"}

func (p *pod) has(name string) bool {
	return slices.ContainsFunc(p.Spec.InitContainers, func(c container) bool { return c.Name == name })
}

// fits says why a pod cannot have a sidecar: its rules would hold for the whole
// machine, or one of its containers could get around them.
func (p *pod) fits(cfg *Config, injected bool) error {
	var errs []error
	if p.Spec.HostNetwork {
		errs = append(errs, errors.New("hostNetwork: the sidecar would capture the node; make the pod in a namespace without sidecars"))
	}
	if s := p.Spec.Share; s != nil && !*s {
		errs = append(errs, errors.New("shareProcessNamespace: false hides the workload from its sidecar; leave it out"))
	}
	for _, v := range p.Spec.Volumes {
		if injected && slices.ContainsFunc(volumes(cfg), func(o any) bool { return o.(object)["name"] == v.Name }) {
			continue // which ours looks at
		}
		if strings.HasPrefix(v.Name, prefix) {
			errs = append(errs, fmt.Errorf("volume %s: names that begin with %s are the sidecar's; choose another", v.Name, prefix))
		}
		if v.proves(cfg.Audience) {
			errs = append(errs, fmt.Errorf("volume %s: a token for %s is what the sidecar is attested by; leave it out", v.Name, cfg.Audience))
		}
	}
	first := p.Spec.InitContainers
	if injected {
		first = slices.DeleteFunc(slices.Clone(first), func(c container) bool { return c.Name == sidecarName || c.Name == captureName })
	}
	errs = append(errs, p.judge(slices.Concat(first, p.Spec.Containers, p.Spec.Ephemeral), cfg))
	if app, ok := p.Metadata.Annotations[annotationApp]; ok {
		if a, err := netip.ParseAddrPort(app); err != nil || !a.Addr().IsLoopback() {
			errs = append(errs, fmt.Errorf("annotation %s: %q is no address on loopback, such as \"127.0.0.1:8080\"", annotationApp, app))
		}
	}
	return errors.Join(errs...)
}

// proves tells whether there is a token in the volume by which a pod is attested.
func (v *volume) proves(audience string) bool {
	if v.Projected == nil {
		return false
	}
	for _, s := range v.Projected.Sources {
		if s.Token != nil && s.Token.Audience == audience {
			return true
		}
	}
	return false
}

// judge says how containers of the pod that are not ours could get around it.
func (p *pod) judge(list []container, cfg *Config) error {
	var errs []error
	for _, c := range list {
		wrong := c.confined(cmp.Or(p.Spec.SecurityContext, &securityContext{}).RunAsUser, cfg.User)
		if strings.HasPrefix(c.Name, prefix) {
			wrong = append(wrong, "names that begin with "+prefix+" are the sidecar's; choose another")
		}
		for _, m := range c.VolumeMounts {
			if given := (volumeMount{Name: workloadName, MountPath: workloadDir, ReadOnly: true}); strings.HasPrefix(m.Name, prefix) && m != given {
				wrong = append(wrong, fmt.Sprintf("it mounts %s, which is the sidecar's; leave it out", m.Name))
			}
		}
		for _, w := range wrong {
			errs = append(errs, fmt.Errorf("container %s: %s", c.Name, w))
		}
	}
	return errors.Join(errs...)
}

// confined says what is wrong with the rights of a container in a pod that runs as
// user, when the sidecar runs as own.
func (c *container) confined(user *int64, own int64) (wrong []string) {
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	s := cmp.Or(c.SecurityContext, &securityContext{})
	switch as := cmp.Or(s.RunAsUser, user); {
	case as == nil:
		say("without runAsUser its image says who it is, which may be root or the sidecar's user; set runAsUser to a number that is neither 0 nor %d", own)
	case *as == 0:
		say("runAsUser 0 may become any user; set a number that is neither 0 nor %d", own)
	case *as == own:
		say("runAsUser %d is the sidecar's own user, which is not captured; set another, not 0", own)
	}
	if s.Privileged != nil && *s.Privileged {
		say("privileged, and could change the rules; leave it out")
	}
	if s.Escalation == nil || *s.Escalation {
		say("a program with the setuid bit may make it another user; set allowPrivilegeEscalation: false")
	}
	var add, drop []string
	if s.Capabilities != nil {
		add, drop = s.Capabilities.Add, s.Capabilities.Drop
	}
	for _, a := range add {
		if slices.Contains(mighty, capability(a)) {
			say("%s, with which it could get around the sidecar; leave it out", a)
		}
	}
	dropped := func(name string) bool {
		return slices.ContainsFunc(drop, func(d string) bool { return capability(d) == name || capability(d) == "ALL" })
	}
	if !dropped(without[0]) || !dropped(without[1]) || !dropped(without[2]) {
		say("it has capabilities by which it could get around the sidecar; set capabilities: {drop: [ALL]}, or drop %s", strings.Join(without, ", "))
	}
	return wrong
}

func capability(name string) string { return strings.TrimPrefix(strings.ToUpper(name), "CAP_") }
