package main

import (
	"fmt"
	"strings"
)

const (
	sidecarName = "sallyport-sidecar"
	captureName = "sallyport-capture"
	// workloadName is the one volume of ours that an application has, to read.
	workloadName = "sallyport-workload"

	// prefix begins the names of what is added, which nothing else may have.
	prefix = "sallyport-"

	// annotationInject is "false" on a pod that wants no sidecar, where the operator
	// lets pods say so, and annotationApp is where its application listens, such as "127.0.0.1:8080"; without it the
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
			HostNetwork     bool             `json:"hostNetwork"`
			Share           *bool            `json:"shareProcessNamespace"`
			SecurityContext *securityContext `json:"securityContext"`
			InitContainers  []container      `json:"initContainers"`
			Containers      []container      `json:"containers"`
			Ephemeral       []container      `json:"ephemeralContainers"`
			Volumes         []volume         `json:"volumes"`
		} `json:"spec"`
	}
	container struct {
		Name            string                  `json:"name"`
		Image           string                  `json:"image"`
		Env             []struct{ Name string } `json:"env"`
		VolumeMounts    []volumeMount           `json:"volumeMounts"`
		SecurityContext *securityContext        `json:"securityContext"`
	}
	volumeMount struct {
		Name      string `json:"name"`
		MountPath string `json:"mountPath"`
		ReadOnly  bool   `json:"readOnly"`
		SubPath   string `json:"subPath"`
	}
	volume struct {
		Name      string `json:"name"`
		Projected *struct {
			Sources []struct {
				Token *struct {
					Audience string `json:"audience"`
				} `json:"serviceAccountToken"`
			} `json:"sources"`
		} `json:"projected"`
	}
	securityContext struct {
		RunAsUser    *int64 `json:"runAsUser"`
		Privileged   *bool  `json:"privileged"`
		Escalation   *bool  `json:"allowPrivilegeEscalation"`
		Capabilities *struct {
			Add  []string `json:"add"`
			Drop []string `json:"drop"`
		} `json:"capabilities"`
	}
)

// An operation is one of JSON Patch (RFC 6902).
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
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
		each(at+"/volumeMounts", len(c.VolumeMounts) == 0, "-", mount(workloadName, workloadDir, true))
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
			mount("sallyport-state", stateDir, false), mount(workloadName, workloadDir, false),
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
		object{"name": workloadName, "emptyDir": object{"medium": "Memory", "sizeLimit": "1Mi"}},
	}
}
