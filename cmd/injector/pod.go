package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

const (
	sidecarName = "sallyport-sidecar"
	captureName = "sallyport-capture"

	// annotationInject is "false" on a pod that wants no sidecar, and annotationApp
	// is where its application listens, such as "127.0.0.1:8080"; without it the
	// pod calls and is not called.
	annotationInject = "sallyport/inject"
	annotationApp    = "sallyport/app"
	annotationStatus = "sallyport/status"

	etcDir      = "/etc/sallyport"
	stateDir    = "/var/lib/sallyport"
	workloadDir = "/run/sallyport/workload"
	socketPath  = workloadDir + "/api.sock"
	tokenDir    = "/var/run/secrets/sallyport"
	inboundPort = 15006
)

// The parts of a pod that are looked at.
type (
	pod struct {
		Metadata struct {
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
		Spec struct {
			HostNetwork     bool                    `json:"hostNetwork"`
			Share           *bool                   `json:"shareProcessNamespace"`
			SecurityContext *securityContext        `json:"securityContext"`
			InitContainers  []container             `json:"initContainers"`
			Containers      []container             `json:"containers"`
			Volumes         []struct{ Name string } `json:"volumes"`
		} `json:"spec"`
	}
	container struct {
		Name            string                  `json:"name"`
		Env             []struct{ Name string } `json:"env"`
		VolumeMounts    []struct{ Name string } `json:"volumeMounts"`
		SecurityContext *securityContext        `json:"securityContext"`
	}
	securityContext struct {
		RunAsUser    *int64 `json:"runAsUser"`
		Privileged   *bool  `json:"privileged"`
		Capabilities *struct {
			Add []string `json:"add"`
		} `json:"capabilities"`
	}
)

// An operation is one of JSON Patch (RFC 6902).
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

func (p *pod) has(name string) bool {
	for _, c := range append(p.Spec.InitContainers, p.Spec.Containers...) {
		if c.Name == name {
			return true
		}
	}
	return false
}

// fits says why a pod cannot have a sidecar: its rules would hold for the whole
// machine, or one of its containers could get around them.
func (p *pod) fits(user int64) error {
	var errs []error
	if p.Spec.HostNetwork {
		errs = append(errs, errors.New("hostNetwork: the sidecar would capture the node; annotate the pod "+annotationInject+`: "false"`))
	}
	if s := p.Spec.Share; s != nil && !*s {
		errs = append(errs, errors.New("shareProcessNamespace: false hides the workload from its sidecar; leave it out"))
	}
	as := func(s *securityContext) bool { return s != nil && s.RunAsUser != nil && *s.RunAsUser == user }
	if as(p.Spec.SecurityContext) {
		errs = append(errs, fmt.Errorf("runAsUser %d is the sidecar's own user, which is not captured", user))
	}
	for _, c := range append(p.Spec.InitContainers, p.Spec.Containers...) {
		s := c.SecurityContext
		if as(s) {
			errs = append(errs, fmt.Errorf("container %s: runAsUser %d is the sidecar's own user, which is not captured", c.Name, user))
		}
		if s == nil {
			continue
		}
		if s.Privileged != nil && *s.Privileged {
			errs = append(errs, fmt.Errorf("container %s: privileged, and could change the rules", c.Name))
		}
		if s.Capabilities != nil {
			for _, a := range s.Capabilities.Add {
				switch strings.TrimPrefix(strings.ToUpper(a), "CAP_") {
				case "NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE", "NET_RAW", "ALL":
					errs = append(errs, fmt.Errorf("container %s: %s, with which it could get around the sidecar", c.Name, a))
				}
			}
		}
	}
	if app, ok := p.Metadata.Annotations[annotationApp]; ok {
		if a, err := netip.ParseAddrPort(app); err != nil || !a.Addr().IsLoopback() {
			errs = append(errs, fmt.Errorf("annotation %s: %q is no address on loopback, such as \"127.0.0.1:8080\"", annotationApp, app))
		}
	}
	return errors.Join(errs...)
}

// with adds the sidecar, and before it what puts the rules into force.
func (p *pod) with(cfg *Config) (ops []operation) {
	add := func(path string, value any) { ops = append(ops, operation{"add", path, value}) }
	each := func(path string, empty bool, at string, values ...any) {
		if empty {
			add(path, values)
			return
		}
		for _, v := range values {
			add(path+"/"+at, v)
		}
	}
	// One after the other at 0: the last stands first.
	if first := []any{p.capture(cfg), p.sidecar(cfg)}; len(p.Spec.InitContainers) == 0 {
		add("/spec/initContainers", first)
	} else {
		each("/spec/initContainers", false, "0", first[1], first[0])
	}
	each("/spec/volumes", len(p.Spec.Volumes) == 0, "-", volumes(cfg)...)
	for i, c := range p.Spec.Containers {
		at := fmt.Sprintf("/spec/containers/%d", i)
		each(at+"/env", len(c.Env) == 0, "-", env("SPIFFE_ENDPOINT_SOCKET", "unix://"+socketPath))
		each(at+"/volumeMounts", len(c.VolumeMounts) == 0, "-", mount("sallyport-workload", workloadDir, true))
	}
	if p.Spec.Share == nil {
		add("/spec/shareProcessNamespace", true)
	}
	if p.Metadata.Annotations == nil {
		add("/metadata/annotations", map[string]string{annotationStatus: "injected"})
	} else {
		add("/metadata/annotations/"+strings.ReplaceAll(annotationStatus, "/", "~1"), "injected")
	}
	return ops
}

type object map[string]any

func env(name, value string) object { return object{"name": name, "value": value} }

func mount(name, path string, readOnly bool) object {
	m := object{"name": name, "mountPath": path}
	if readOnly {
		m["readOnly"] = true
	}
	return m
}

// sidecar is a native sidecar: it starts before the application and ends after it.
func (p *pod) sidecar(cfg *Config) object {
	c := object{
		"name": sidecarName, "image": cfg.Image, "restartPolicy": "Always",
		"command": []string{"/sidecar", "run", "--config", etcDir + "/sidecar.yaml"},
		"env": []object{
			{"name": "POD_IP", "valueFrom": object{"fieldRef": object{"fieldPath": "status.podIP"}}},
			env("SALLYPORT_WORKLOAD_SOCKET", socketPath),
		},
		"securityContext": confined(cfg.User),
		"volumeMounts": []object{
			mount("sallyport-config", etcDir, true), mount("sallyport-token", tokenDir, true),
			mount("sallyport-state", stateDir, false), mount("sallyport-workload", workloadDir, false),
		},
		"resources": object{"requests": object{"cpu": "10m", "memory": "32Mi"}},
	}
	if app, ok := p.Metadata.Annotations[annotationApp]; ok {
		port := fmt.Sprint(inboundPort)
		c["env"] = append(c["env"].([]object),
			env("SALLYPORT_INBOUND_APP", app), env("SALLYPORT_INBOUND_LISTEN", "0.0.0.0:"+port), env("SALLYPORT_INBOUND_ADVERTISE", "$(POD_IP):"+port))
		c["ports"] = []object{{"name": "sallyport", "containerPort": inboundPort}}
		// It opens its port once it has an SVID and a policy; the application
		// starts after that.
		c["startupProbe"] = object{"tcpSocket": object{"port": inboundPort}, "periodSeconds": 1, "failureThreshold": 120}
	}
	return c
}

// capture puts the rules into force and ends.
func (p *pod) capture(cfg *Config) object {
	s := confined(0)
	s["runAsNonRoot"] = false
	s["capabilities"] = object{"drop": []string{"ALL"}, "add": []string{"NET_ADMIN"}}
	return object{
		"name": captureName, "image": cfg.Image,
		"command":         []string{"/sidecar", "capture", "install", "--config", etcDir + "/sidecar.yaml"},
		"securityContext": s,
		"volumeMounts":    []object{mount("sallyport-config", etcDir, true)},
	}
}

func confined(user int64) object {
	return object{
		"runAsUser": user, "runAsGroup": user, "runAsNonRoot": true, "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false,
		"capabilities": object{"drop": []string{"ALL"}}, "seccompProfile": object{"type": "RuntimeDefault"},
	}
}

func volumes(cfg *Config) []any {
	return []any{
		object{"name": "sallyport-config", "configMap": object{"name": cfg.ConfigMap}},
		object{"name": "sallyport-token", "projected": object{"sources": []object{
			{"serviceAccountToken": object{"path": "token", "audience": cfg.Audience, "expirationSeconds": 600}},
		}}},
		object{"name": "sallyport-state", "emptyDir": object{"medium": "Memory", "sizeLimit": "256Mi"}},
		object{"name": "sallyport-workload", "emptyDir": object{"medium": "Memory", "sizeLimit": "1Mi"}},
	}
}
